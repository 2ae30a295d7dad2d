"""Jobs in processes of their own: what they say when they die, run out of memory or take too long; and the memory of this one."""

from __future__ import annotations

import mmap
from dataclasses import asdict

import numpy as np
import pytest

from mmlong.bench.contest import Subject
from mmlong.bench.process import how_it_died, run_job
from mmlong.measure import memory
from mmlong.measure.machine import copy_bandwidth, describe, gemm_peak


def test_a_job_that_dies_shows_the_end_of_its_errors() -> None:
    found = run_job({"kind": "nothing of the sort", "device": "cpu"})
    assert set(found) == {"failed"}
    assert found["failed"].startswith("exit status 1\n")
    assert found["failed"].endswith("KeyError: 'nothing of the sort'")


def test_a_job_that_takes_too_long_is_stopped() -> None:
    assert run_job({"kind": "machine", "timeout": 0.01}) == {"failed": "took more than 0.01 s and was stopped"}


def test_how_a_process_died() -> None:
    assert how_it_died(-9, "") == "killed by SIGKILL (out of memory, most likely)"
    assert how_it_died(-11, "a\n\nb\n") == "killed by SIGSEGV\na\nb"
    assert how_it_died(3, "\n".join(map(str, range(99)))).split("\n") == ["exit status 3", *map(str, range(87, 99))]


@pytest.mark.slow
@pytest.mark.skipif(memory.available_bytes() is None, reason="memory is limited on Linux only")
def test_out_of_memory_is_an_answer() -> None:
    job = {
        "kind": "layer", "subject": asdict(Subject("s4d")), "dim": 16, "batch": 1, "length": 100_000, "dtype": "fp32", "mode": "both", "repeats": 1,
        "count": False, "device": "cpu", "threads": 1,
    }  # fmt: skip
    found = run_job({**job, "length": 50, "max_memory": 20_000_000_000})
    assert found["times"][0]["all"] > 0
    found = run_job({**job, "max_memory": 50_000_000})
    assert found["failed"].startswith("out of memory: ")


def test_the_peak_of_memory_can_be_set_back() -> None:
    if not memory.reset_peak():
        pytest.skip("this system does not let a process do so")
    before = memory.peak_bytes()
    # Pages of its own: what numpy hands out may be memory that an earlier test has left behind, which is resident already.
    held = mmap.mmap(-1, 40_000_000)
    np.frombuffer(held, np.uint8)[:] = 1
    assert memory.peak_bytes() - before >= 0.9 * len(held)
    held.close()
    assert memory.reset_peak()
    assert memory.peak_bytes() - before < 20_000_000


def test_the_machine_is_measured_and_described() -> None:
    import torch

    assert gemm_peak(torch.bfloat16, seconds=0.0, sizes=[8, 16]) > 0
    assert copy_bandwidth(seconds=0.0, size=1 << 16) > 0
    said = describe("cpu", 3)
    assert said["threads"] == 3
    assert said["versions"]["torch"] == torch.__version__.partition("+")[0]
