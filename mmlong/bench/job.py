"""One job in this process: read from standard input as JSON, the result a marked line of standard output. ``python -m mmlong.bench.job``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import suppress
from typing import Any

from mmlong.bench.process import MARK

KINDS = {
    "machine": "mmlong.measure.machine:measure",
    "layer": "mmlong.bench.layers:measure",
    "compare": "mmlong.bench.layers:compare",
    "model": "mmlong.bench.step:measure",
    "stream": "mmlong.bench.stream:measure",
}
"""Kind of a job to the function that does it."""


def main() -> None:
    job: dict[str, Any] = json.loads(sys.stdin.read())
    module, _, name = KINDS[job["kind"]].partition(":")
    # If the machine runs out of memory all the same, this process is the one to go.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    import torch

    from mmlong.bench.layers import out_of_memory
    from mmlong.measure.memory import limit_memory

    if job.get("threads"):
        torch.set_num_threads(int(job["threads"]))
    if job.get("max_memory") and job["device"] == "cpu":
        limit_memory(int(job["max_memory"]))
    try:
        result = getattr(importlib.import_module(module), name)(job)
    except Exception as error:
        if not out_of_memory(error):
            raise
        result = {"failed": "out of memory: " + str(error).strip().split("\n")[0][:200]}
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
