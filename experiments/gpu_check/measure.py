"""Hold an op on a device against itself in float64 on a CPU; hold a mixer whole against itself in pieces; time both on a GPU."""

from __future__ import annotations

import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from mmlong.experiments.gpu_check.cases import Case, Inputs, Sizes
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import MIXERS, create_mixer
from mmlong.ops.backends import BackendError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ALLOWED = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
"""Length of the difference over the length of what is right, of every output and every gradient."""

COARSE = 4e-3
"""The same in float32 for kernels whose products are TF32 (10 bits)."""

SLACK = 3.0
"""What a backend may err more than plain torch does in the same type, where that is more than the above."""

MIXER_ALLOWED = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass
class Row:
    """One line of the report.

    Attributes:
        what: op or mixer, with the question.
        backend: or the two sides that are compared.
        dtype: of the inputs.
        status: ``PASS``, ``FAIL``, ``absent`` (not installed, or not on this device) or ``refused`` (installed, and says that it cannot do this).
        error: the largest, relative; ``None`` where nothing was compared.
        allowed: what it may be.
        note: where the error is largest, or why there is none.
        seconds: of forward and backward at the timed size.
        gigabytes: at their peak beyond what was there before (10^9 bytes).
    """

    what: str
    backend: str
    dtype: str
    status: str
    error: float | None = None
    allowed: float | None = None
    note: str = ""
    seconds: float | None = None
    gigabytes: float | None = None

    def dict(self) -> dict[str, Any]:
        return asdict(self)


def relative(found: Tensor, right: Tensor) -> float:
    """``|found - right| / |right|`` in float64 on a CPU; what should be zero is held against the length of one unit."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    size = right.norm()
    return float((found - right).norm() / (size if size > 0 else 1.0))


def _results(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Outputs, and gradients of them along fixed directions."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t.is_floating_point()}
    outputs = case.run(inputs | leaves, backend)
    r = torch.Generator().manual_seed(7)
    along = [torch.randn(y.shape, generator=r, dtype=torch.float64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), along, allow_unused=True)
    found = {("output", "state")[i]: y for i, y in enumerate(outputs)}
    for (name, leaf), g in zip(leaves.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if g is None else g
    return found


def _cast(case: Case, inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    """Inputs on a device, those of ``case.low`` in ``dtype`` and other real ones in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    types = {n: t.dtype if not t.is_floating_point() else dtype if n in case.low else wide for n, t in inputs.items()}
    return {name: t.to(device, types[name]) for name, t in inputs.items()}


def check_op(case: Case, sizes: Sizes, device: str, dtypes: list[str]) -> list[Row]:
    """A row for every backend and type."""
    made = case.make(sizes, torch.Generator().manual_seed(0))
    rows = []
    for name in dtypes:
        dtype = TYPES[name]
        given = _cast(case, made, device, dtype)
        # The same numbers, with the digits that were left.
        exact = {k: t.double().cpu() if t.is_floating_point() else t.cpu() for k, t in given.items()}
        right = _results(case, exact, "auto")
        plain: float | None = None
        for backend in case.names():
            row = Row(f"{case.op}: {case.name}", backend, name, "PASS")
            rows.append(row)
            try:
                found = _results(case, given, backend)
            except BackendError as refusal:
                _excuse(row, case, backend, device, refusal)
                continue
            except Exception as failure:
                _failed(row, failure)
                continue
            errors = {key: relative(found[key], right[key]) for key in right}
            worst = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))
            row.error, row.note = errors[worst], worst
            coarse = backend in case.coarse or torch.get_float32_matmul_precision() != "highest"
            row.allowed = COARSE if name == "fp32" and coarse else ALLOWED[name]
            if plain is None:
                plain = row.error
                # Plain torch in half precision sums what it will; that is the measure, and has one of its own.
                row.allowed *= SLACK if name != "fp32" else 1
            else:
                row.allowed = max(row.allowed, SLACK * plain)
            if not row.error <= row.allowed:
                row.status = "FAIL"
    return rows


def _excuse(row: Row, case: Case, backend: str, device: str, refusal: BackendError) -> None:
    """Not there, or there and unable; what is there but cannot be imported has failed."""
    row.note = refusal.reason or str(refusal)
    if isinstance(refusal.__cause__, Exception):
        row.status = "FAIL"
        return
    assert case.backends is not None
    known = case.backends[backend]
    elsewhere = known.devices is not None and device not in known.devices
    row.status = "absent" if elsewhere or not known.available()[0] else "refused"


def _failed(row: Row, failure: Exception) -> None:
    row.status = "FAIL"
    row.note = "".join(traceback.format_exception_only(failure)).strip()


# Speed


def timed(work: Callable[[], None], device: str, repeats: int = 5) -> tuple[float, float]:
    """Median seconds of some calls after two that are not counted, and the peak of memory beyond what was there, in 10^9 bytes."""
    for _ in range(2):
        work()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, seconds = torch.cuda.memory_allocated(device), []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), (torch.cuda.max_memory_allocated(device) - before) / 1e9


def time_op(case: Case, sizes: Sizes, device: str, dtypes: list[str]) -> list[Row]:
    """A row for every backend and type that runs at this size."""
    made = case.make(sizes, torch.Generator().manual_seed(0))
    rows = []
    for name in dtypes:
        given = _cast(case, made, device, TYPES[name])
        for backend in case.names():
            row = Row(f"{case.op}: {case.name}, {sizes.length:,} tokens", backend, name, "PASS", note="timed")
            rows.append(row)
            try:
                row.seconds, row.gigabytes = timed(_work(case, given, backend), device)
            except BackendError as refusal:
                _excuse(row, case, backend, device, refusal)
            except torch.OutOfMemoryError:
                row.status, row.note = "refused", "out of memory at this size"
            except Exception as failure:
                _failed(row, failure)
            torch.cuda.empty_cache()
    return rows


def _work(case: Case, inputs: Inputs, backend: str) -> Callable[[], None]:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t.is_floating_point()}

    def work() -> None:
        outputs = case.run(inputs | leaves, backend)
        along = [torch.ones_like(y) for y in outputs]
        torch.autograd.grad(outputs, list(leaves.values()), along, allow_unused=True)

    return work


# Mixers


def check_mixers(names: list[str], device: str, dim: int, length: int, dtypes: list[str]) -> list[Row]:
    """For every mixer: this device against a CPU, outputs, states and gradients; and where it streams, whole against pieces, with padding and documents."""
    rows = []
    for name in names:
        torch.manual_seed(0)
        mixer = create_mixer(name, dim, causal=MIXERS[name].traits.causal)
        # Straight from its initial values a mixer may hardly use some part of itself.
        with torch.no_grad():
            for p in mixer.parameters():
                p.add_(0.02 * torch.randn_like(p))
        x = torch.randn(2, length, dim)
        if device != "cpu":
            rows.append(_compared(name, f"{device} = cpu", "fp32", lambda m=mixer, x=x: _both(m, x, device)))
        if mixer.streaming:
            layout = _ragged(mixer, length)
            for dtype in dtypes:
                for told, where in (("", None), (", padded documents", layout)):
                    if told and layout is None:
                        continue

                    def pieces(m: Any = mixer, x: Tensor = x, where: Layout | None = where, t: str = dtype) -> float:
                        return _pieces(m.to(device), x.to(device), None if where is None else where.to(device), t)

                    rows.append(_compared(name + told, "whole = pieces", dtype, pieces))
    return rows


def _compared(what: str, sides: str, dtype: str, compare: Callable[[], float]) -> Row:
    row = Row(f"mixer: {what}", sides, dtype, "PASS", allowed=MIXER_ALLOWED[dtype])
    try:
        row.error = compare()
    except Exception as failure:
        _failed(row, failure)
    else:
        assert row.allowed is not None
        row.status = "PASS" if row.error <= row.allowed else "FAIL"
    return row


def _ragged(mixer: Any, length: int) -> Layout | None:
    traits = mixer.traits
    if not (traits.padding and traits.resets):
        return None
    resets = torch.zeros(2, length, dtype=torch.bool)
    resets[0, length // 5] = resets[0, length // 2] = resets[1, 0] = True
    return Layout(lengths=torch.tensor([length, length - length // 4]), resets=resets)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _both(mixer: Any, x: Tensor, device: str) -> float:
    found = []
    for where in ("cpu", device):
        m, there = mixer.to(where), x.detach().to(where).requires_grad_()
        y, state = m(there)
        leaves = [there, *m.parameters()]
        r = torch.Generator().manual_seed(7)
        along = torch.randn(y.shape, generator=r).to(y)
        gradients = torch.autograd.grad(y, leaves, along, allow_unused=True)
        kept = [t for t in _tensors(state) if t.is_floating_point()]
        found.append([t.cpu() for t in (y, *kept, *(g for g in gradients if g is not None))])
    return max(relative(b, a) for a, b in zip(*found, strict=True))


@torch.no_grad()
def _pieces(mixer: Any, x: Tensor, layout: Layout | None, dtype: str) -> float:
    L = x.shape[1]
    cuts = [0, L // 3, L // 3 + 1, L]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        whole, last = mixer(x, None, layout)
        parts, state = [], None
        for i, j in itertools.pairwise(cuts):
            y, state = mixer(x[:, i:j], state, None if layout is None else layout.slice(i, j))
            parts.append(y)
    found = torch.cat(parts, 1)
    valid = None if layout is None else layout.valid(L)
    if valid is not None:
        whole, found = whole[valid], found[valid]
    pairs = [(found, whole)]
    for a, b in zip(_tensors(state), _tensors(last), strict=True):
        if a.shape != b.shape:
            # A state that grows may keep more than it needs: what it holds is held by the next token's output.
            pairs = pairs[:1]
            break
        pairs.append((a, b))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        token = x[:, :1].flip(0)
        pairs.append((mixer(token, state)[0], mixer(token, last)[0]))
    return max(relative(a, b) for a, b in pairs)
