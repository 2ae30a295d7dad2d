"""One layer, a mixer or a block, ours or a peer's: build it, run it forward and backward, take the time and the memory.

The order in a process: build; a short run, which sets up threads and kernels; the memory held then is the baseline; inputs; the timed runs; the most memory held; then, where asked for, one
more run under the counter of :mod:`mmlong.bench.flops`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.bench.flops import count
from mmlong.bench.peers import PEERS, Run
from mmlong.measure import memory
from mmlong.measure.machine import DTYPES, synchronise
from mmlong.mixers import MIXERS, create_mixer

WARM_UP = 1024
"""Tokens of the first, short run."""
COMPARED = 1500
"""Tokens on which the two sides of a comparison must agree."""


def autocast(job: dict[str, Any]) -> AbstractContextManager[Any]:
    """As training does it: nothing for ``fp32``, autocast for ``bf16``."""
    dtype = DTYPES[job["dtype"]]
    return nullcontext() if dtype == torch.float32 else torch.autocast(job["device"], dtype=dtype)


def usual_direction(mixer: str) -> str:
    """``causal`` for a mixer that has such a form, else ``both``."""
    return "causal" if MIXERS[mixer].traits.causal else "both"


def build(subject: dict[str, Any], dim: int) -> tuple[nn.Module, Run]:
    """The module of one side, its weights the same each time, and how to run it on ``x (B, L, D)``.

    Args:
        subject: the fields of :class:`mmlong.bench.contest.Subject`.
        dim: width D.
    """
    torch.manual_seed(0)
    if subject["peer"] is not None:
        pair = PEERS[subject["peer"]].pair(dim, subject["options"])
        return (pair.ours, pair.run_ours) if subject["side"] == "ours" else (pair.theirs, pair.run_theirs)
    direction = subject["direction"] or usual_direction(subject["mixer"])
    if direction == "causal" and subject["ffn"] is None:
        # The backbone imports much, in every process anew.
        module: Any = create_mixer(subject["mixer"], dim, causal=True, **subject["options"])
    else:
        from mmlong.backbone import Block, create_directed

        module = create_directed({"name": subject["mixer"], **subject["options"]}, dim, direction, 0)  # type: ignore[arg-type]
        module = module if subject["ffn"] is None else Block(module, dim, subject["ffn"])
    return module, lambda x: module(x)[0]


def data(batch: int, length: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs, and the gradient of the outputs: ``(B, L, D)`` each, always the same."""
    draw = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(batch, length, dim, generator=draw) for _ in range(2))
    return x.to(device).requires_grad_(), dy.to(device)


class Gauge:
    """Memory above a baseline, of the process or of the GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.baseline = torch.cuda.memory_allocated()
        else:
            if not memory.reset_peak():
                self.before = memory.peak_bytes()
            self.baseline = memory.resident_bytes()

    def read(self) -> dict[str, Any]:
        """``peak``, ``baseline`` and ``memory`` between them, in bytes. Where the system cannot set the peak back, imports may have held more: then ``memory`` is ``None``."""
        peak = int(torch.cuda.max_memory_allocated()) if self.device == "cuda" else memory.peak_bytes()
        known = peak > self.before
        return {"peak": peak, "baseline": self.baseline, "memory": max(peak - self.baseline, 0) if known else None}


def timed(
    begin: Callable[[], Any], forward: Callable[[], Any], backward: Callable[[Any], Any] | None, device: str
) -> dict[str, float]:
    """Seconds of the ``forward`` and of ``all``, and ``cpu``, of processor time of all (of all threads, waiting for each other included). ``begin`` is not timed."""
    begin()
    synchronise(device)
    cpu, start = time.process_time(), time.perf_counter()
    y = forward()
    synchronise(device)
    between = time.perf_counter()
    if backward is not None:
        backward(y)
        synchronise(device)
    return {
        "forward": between - start,
        "all": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Times, memory and counted work of one side.

    Args:
        job: ``subject`` (see :func:`build`), ``dim``, ``batch``, ``length``, ``dtype``, ``mode`` (``forward``, without a graph, or ``both``), ``repeats``, ``count``, ``device``.
    """
    device, both = job["device"], job["mode"] == "both"
    module, run = build(job["subject"], job["dim"])
    module.to(device)

    def measured(
        batch: int, length: int
    ) -> tuple[Callable[[], None], Callable[[], Tensor], Callable[[Any], Any] | None]:
        x, dy = data(batch, length, job["dim"], device)

        def forget() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None

        def forward() -> Tensor:
            with autocast(job), nullcontext() if both else torch.no_grad():
                return run(x)

        return forget, forward, (lambda y: y.backward(dy.to(y.dtype))) if both else None

    timed(*measured(1, min(WARM_UP, job["length"])), device)
    module.zero_grad(set_to_none=True)
    gauge = Gauge(device)
    forget, forward, backward = measured(job["batch"], job["length"])
    times = [timed(forget, forward, backward, device) for _ in range(job["repeats"])]
    found = {"times": times, **gauge.read(), "flops": None}
    if job["count"]:
        forget()
        found["flops"] = counted(forward, backward)
    return found


def counted(forward: Callable[[], Any], backward: Callable[[Any], Any] | None) -> dict[str, int] | None:
    """:func:`~mmlong.bench.flops.count`; ``None`` if it needs more memory than there is, which the timed runs did not."""
    try:
        return count(forward, backward)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text)


def compare(job: dict[str, Any]) -> dict[str, float]:
    """The largest difference of the two sides' outputs and input gradients, over the largest value."""
    torch.manual_seed(0)
    pair = PEERS[job["subject"]["peer"]].pair(job["dim"], job["subject"]["options"])
    device = job["device"]
    for module in (pair.ours, pair.theirs):
        module.to(device)
    x, dy = data(2, min(COMPARED, job["length"]), job["dim"], device)
    y = [run(x) for run in (pair.run_ours, pair.run_theirs)]
    dx = [torch.autograd.grad(t, x, dy)[0] for t in y]
    return {"difference": max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in (y, dx))}
