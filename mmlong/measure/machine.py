"""What the machine can do, measured in the same run: its fastest matrix product and copy; and which machine it is.

Every share and goal is taken of these, since a busy or throttled machine is slower at everything.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmlong.measure.checkout import commit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEMM_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPIED = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes of the array that is copied: far more than any cache holds."""
PACKAGES = ("torch", "transformers", "local-attention", "s5-pytorch", "fla-core", "xformers", "numpy")


def synchronise(device: str) -> None:
    """Wait for what was begun on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def _best(run: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest of as many runs as take about so long, at least three after a first."""
    run()
    synchronise(device)
    best, begun, times = float("inf"), time.perf_counter(), 0
    while times < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        run()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
        times += 1
    return best


def gemm_peak(
    dtype: torch.dtype, device: str = "cpu", seconds: float = 0.5, sizes: Sequence[int] | None = None
) -> float:
    """FLOP/s of the fastest square product.

    Args:
        dtype: of both sides and the result.
        device: ``cpu`` or ``cuda``.
        seconds: to spend on each size.
        sizes: widths of the matrices, in place of the usual ones.
    """
    rates = []
    for n in sizes or GEMM_SIZES[device]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates.append(2 * n**3 / _best(partial(torch.mm, a, b, out=out), device, seconds))
    return max(rates)


def copy_bandwidth(device: str = "cpu", seconds: float = 0.5, size: int | None = None) -> float:
    """Bytes/s, read and written, of copying ``size`` bytes from one array to another."""
    source = torch.ones((size or COPIED[device]) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _best(partial(target.copy_, source), device, seconds)


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Peaks of this machine: ``gemm_fp32`` and ``gemm_bf16`` in FLOP/s, of those asked for in ``dtypes``, and ``copy`` in bytes/s.

    Args:
        job: ``device``, ``dtypes``, and the arguments of the two measurements where they are given: ``seconds``, ``sizes``, ``copied``.
    """
    device, seconds = job["device"], float(job.get("seconds", 0.5))
    found = {f"gemm_{name}": gemm_peak(DTYPES[name], device, seconds, job.get("sizes")) for name in job["dtypes"]}
    return {**found, "copy": copy_bandwidth(device, seconds, job.get("copied"))}


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, Any]:
    """Which machine: plain values for a report."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def describe(device: str, threads: int) -> dict[str, Any]:
    """Which machine and software: plain values for a report."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        **hardware(device),
        "python": platform.python_version(),
        "threads": threads or torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
        "commit": commit(),
    }
