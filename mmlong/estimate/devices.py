"""Devices, and the time of counted work on one: a roofline.

Of every class of operators (products, attention, FFTs, everything elementwise) and number format the time is the larger of its arithmetic at the device's peak and its bytes at the memory's
bandwidth (Williams et al. 2009). To the sum comes what starting a kernel costs: before it on a CPU, beside it on a GPU, whichever is longer there. Bytes sent come after, at the link's bandwidth.

It is a bound and not a forecast: no kernel reaches its peak, small products stay far from it, and bytes that a cache still holds cost less than they are counted for.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import torch

from mmlong.estimate.count import Counts
from mmlong.registry import nearest


@dataclass(frozen=True)
class Device:
    """What one device can do.

    Attributes:
        name: to call it by.
        peaks: dtype -> FLOP/s of dense matrix products; another dtype has that of ``float32``.
        bandwidth: bytes/s to its memory.
        memory: bytes that it has.
        link: bytes/s that it sends to others.
        launch: seconds to start a kernel.
        waits: a kernel is started only when the one before it is done (a CPU).
    """

    name: str
    peaks: dict[str, float] = field(hash=False)
    bandwidth: float
    memory: float
    link: float
    launch: float
    waits: bool = False


def _gpu(name: str, fp32: float, half: float, bandwidth: float, memory: float, link: float) -> Device:
    """In TFLOP/s, GB/s, GB and GB/s (one way)."""
    peaks = {"float32": fp32 * 1e12, "bfloat16": half * 1e12, "float16": half * 1e12}
    return Device(name, peaks, bandwidth * 1e9, memory * 1e9, link * 1e9, 5e-6)


# Published by the makers, dense (without structured sparsity), float32 without TF32 as torch has it by default, links one way. A launch from Python takes about 5 us.
DEVICES = {
    device.name: device
    for device in (
        _gpu("a100", 19.5, 312, 2039, 80, 300),  # NVIDIA A100 80GB SXM data sheet (2021); NVLink 600 GB/s both ways
        _gpu("h100", 67, 989, 3350, 80, 450),  # NVIDIA H100 SXM5 data sheet (2023); NVLink 900 GB/s both ways
        _gpu("h200", 67, 989, 4800, 141, 450),  # NVIDIA H200 SXM data sheet (2024)
        _gpu("l4", 30.3, 121, 300, 24, 32),  # NVIDIA L4 data sheet (2023); PCIe 4 x16
        _gpu("rtx4090", 82.6, 165.2, 1008, 24, 32),  # NVIDIA Ada architecture white paper (2022), FP16 with FP32 sums
        _gpu("mi300x", 163.4, 1307.4, 5300, 192, 448),  # AMD Instinct MI300X data sheet (2023); 7 links of 64 GB/s
    )
}

HERE = "here"


def measure_here(seconds: float = 0.3) -> Device:
    """This machine, measured now: its fastest float32 and bfloat16 products, its copy, and what an operator costs at least. Ranks would share its memory, so that is the link.

    Args:
        seconds: to spend on each size that is tried.
    """
    from mmlong.measure.machine import measure

    found = measure({"device": "cpu", "dtypes": ["fp32", "bf16"], "seconds": seconds})
    x, begun, count = torch.zeros(8), time.perf_counter(), 2000
    for _ in range(count):
        x = x + 1
    launch = (time.perf_counter() - begun) / count
    peaks = {"float32": found["gemm_fp32"], "bfloat16": found["gemm_bf16"]}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(HERE, peaks, found["copy"], memory, found["copy"], launch, waits=True)


def find_device(name: str) -> Device:
    """A device by name; ``here`` is measured.

    Raises:
        ValueError: there is none of this name; the nearest is named.
    """
    if name == HERE:
        return measure_here()
    if name not in DEVICES:
        known = [HERE, *DEVICES]
        raise ValueError(f"there is no device {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    return DEVICES[name]


def roofline(counts: Counts, device: Device) -> dict[str, float]:
    """Seconds on one device by class of operators, and ``starting kernels`` for what that adds."""
    seconds: dict[str, float] = {}
    for key, moved in counts.items():
        what, _, rest = key.partition(" ")
        if what != "moved":
            continue
        kind, dtype = rest.rsplit(" ", 1)
        peak = device.peaks.get(dtype, device.peaks["float32"])
        needed = max(counts.get(f"flops {rest}", 0) / peak, moved / device.bandwidth)
        seconds[kind] = seconds.get(kind, 0) + needed
    busy, starting = sum(seconds.values()), counts.get("kernels", 0) * device.launch
    seconds["starting kernels"] = starting if device.waits else max(starting - busy, 0)
    return seconds
