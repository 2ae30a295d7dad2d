"""Jobs in this process, and jobs that only say they ran."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from mmlong.bench.job import KINDS
from mmlong.bench.process import Job, RunJob


@pytest.fixture
def run_here() -> RunJob:
    """A job done in this process, through JSON as it would be."""

    def run(job: Job) -> dict[str, Any]:
        module, _, name = KINDS[job["kind"]].partition(":")
        done = getattr(importlib.import_module(module), name)(json.loads(json.dumps(job)))
        return json.loads(json.dumps(done))

    return run


Answer = Callable[[Job], dict[str, Any]]


class Pretend:
    """Keeps the jobs it is given. Answers seconds as ``seconds(job)`` says, or ``failed``."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.seconds: Callable[[Job], float] = lambda job: 1.0
        self.failed: Callable[[Job], str | None] = lambda job: None
        self.difference = 0.0

    def __call__(self, job: Job) -> dict[str, Any]:
        job = json.loads(json.dumps(job))
        self.jobs.append(job)
        if (why := self.failed(job)) is not None:
            return {"failed": why}
        if job["kind"] == "machine":
            return {**{f"gemm_{dtype}": 1e11 for dtype in job["dtypes"]}, "copy": 2e10}
        if job["kind"] == "compare":
            return {"difference": self.difference}
        seconds = self.seconds(job)
        if job["kind"] == "stream":
            shift = 0.001 if job["compile"] else 0.0
            return {
                "microseconds": [1e6 * seconds] * (job["tokens"] // job["window"]), "begin_seconds": 1.0, "state_bytes": 8, "weight_bytes": 4,
                "prediction": [1.0, -2.0 + shift], "operators": 10.0, "operator_microseconds": 4e5, "profiled_microseconds": 1e6, "single_microseconds": 1e6,
                "batch_microseconds": 1e6 + 63 * 2.5e5,
            }  # fmt: skip
        times = [{"forward": seconds / 3, "all": seconds * (1 + i), "cpu": 2 * seconds} for i in range(job["repeats"])]
        found = {"times": times, "peak": 3_000_000_000, "baseline": 1_000_000_000, "memory": 2_000_000_000}
        flops = {"done": 5 * 10**9, "useful": 4 * 10**9} if job["count"] else None
        return {**found, "flops": flops, "tokens": 640}


@pytest.fixture
def pretend() -> Pretend:
    """Answers at once."""
    return Pretend()
