"""Run one job in a fresh process, and say in a line what went wrong where it did.

A job that runs out of memory, dies, or takes too long is an answer like any other: ``{"failed": reason}``. The rest of a sweep goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
"""Plain values: ``kind`` says what to do (:data:`mmlong.bench.job.KINDS`), ``threads``, ``device`` and ``max_memory`` where; the rest is the kind's own."""
RunJob = Callable[[Job], dict[str, Any]]

MARK = "mmlong-bench-result: "
"""Begins the line of a job's standard output that holds its result: what it imports may print too."""
TAIL = 12
"""Lines of a dead job's errors that are shown."""


def run_job(job: Job) -> dict[str, Any]:
    """The result of a job, or ``{"failed": reason}``.

    ``job["timeout"]`` is how many seconds it may take, ``None`` for any.
    """
    threads = int(job.get("threads") or 0)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mmlong.bench.job"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=job.get("timeout"),
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {job['timeout']:g} s and was stopped"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    return {"failed": how_it_died(done.returncode, done.stderr)}


def how_it_died(status: int, errors: str) -> str:
    """Words for a process that ended without a result."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        why = f"killed by {name}" + (" (out of memory, most likely)" if -status == signal.SIGKILL else "")
    else:
        why = f"exit status {status}"
    tail = "\n".join(line for line in errors.splitlines() if line.strip()).splitlines()[-TAIL:]
    return "\n".join([why, *tail])
