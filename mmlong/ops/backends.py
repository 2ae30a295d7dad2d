"""Backends: the several ways of computing one op, what each can do, and which is taken.

Portable torch is one of them and always there. Others come with an optional package or a device; each declares what it can do, and says, without importing anything
until it is asked, whether it is there and why not. ``auto`` takes the first that can; a name that cannot is an error with the reason, never a silent other way.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
HALVES = frozenset({torch.bfloat16, torch.float16})
CUDA = frozenset({"cuda"})


class BackendError(RuntimeError):
    """No backend, or not the one that was asked for, can do what is asked; the message says why and what to do.

    Attributes:
        reason: why alone, where one backend was asked for.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Request:
    """What is asked of a backend.

    Attributes:
        device: type of the device, e.g. ``"cuda"``.
        dtype: of the arguments.
        mask: the kind of mask, in the op's own words; empty where it has none.
        dropout: whether weights are dropped.
        backward: whether a gradient is wanted.
        sizes: what else a backend may ask about, by the op's own names.
        terms: what else there is to compute beside the op's plain form, in its own words.
    """

    device: str
    dtype: torch.dtype
    mask: str = ""
    dropout: bool = False
    backward: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    terms: frozenset[str] = frozenset()


def _always() -> tuple[bool, str]:
    return True, "part of torch"


@dataclass(frozen=True)
class Backend:
    """One way of computing an op.

    Attributes:
        name: by which it is chosen.
        run: the function.
        devices: device types that it runs on; ``None`` for all.
        dtypes: dtypes that it takes.
        masks: kinds of mask that it takes.
        dropout: can drop weights.
        backward: device types on which it has a gradient; ``None`` for all that it runs on.
        fits: why it cannot do a request whose device, dtype and mask it takes, e.g. for its sizes, or ``None``.
        available: whether it can be used here, and a reason; called late, so it may look for packages.
        automatic: ``auto`` may take it before one that is; otherwise only if asked by name, or no other can.
        note: for `mmlong doctor`.
        terms: what it can compute beside the op's plain form.
    """

    name: str
    run: Callable[..., Any]
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] = FLOATS
    masks: frozenset[str] = frozenset()
    dropout: bool = False
    backward: frozenset[str] | None = None
    fits: Callable[[Request], str | None] | None = None
    available: Callable[[], tuple[bool, str]] = _always
    automatic: bool = True
    note: str = ""
    terms: frozenset[str] = frozenset()

    def refusal(self, request: Request) -> str | None:
        """Why it cannot do this, or ``None`` if it can. Asks whether it is installed last, and only if the rest holds."""
        if self.devices is not None and request.device not in self.devices:
            return f"runs on {_list(self.devices)} only, the tensors are on {request.device}"
        if request.dtype not in self.dtypes:
            return f"takes {_list(_short(d) for d in self.dtypes)}, not {_short(request.dtype)}"
        if request.mask and request.mask not in self.masks:
            return f"has no mask of the kind {request.mask!r}, only {_list(self.masks)}"
        if missing := request.terms - self.terms:
            return f"cannot do {_list(missing)}"
        if request.dropout and not self.dropout:
            return "cannot drop attention weights: set dropout to 0"
        if request.backward and self.backward is not None and request.device not in self.backward:
            return f"has no gradient on {request.device}: use it under torch.no_grad()"
        unfit = None if self.fits is None else self.fits(request)
        if unfit is not None:
            return unfit
        there, reason = self.available()
        return None if there else reason


class Backends:
    """The backends of one op, in order of preference.

    Args:
        op: its name, for messages.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self._known: dict[str, Backend] = {}
        _OPS[op] = self

    def register(self, backend: Backend) -> Backend:
        """Add a backend after those there are. Raises ``ValueError`` if the name is taken."""
        if backend.name in self._known or backend.name == "auto":
            raise ValueError(f"{self.op} already has a backend {backend.name!r}")
        self._known[backend.name] = backend
        return backend

    def names(self) -> list[str]:
        return list(self._known)

    def __getitem__(self, name: str) -> Backend:
        if name not in self._known:
            raise BackendError(f"{self.op} has no backend {name!r}; it has: auto, {', '.join(self._known)}")
        return self._known[name]

    def portable(self) -> Backend:
        """The backend ``portable`` without a request, for a device on which an op has no other."""
        return self._known["portable"]

    def choose(self, request: Request, name: str = "auto", order: Sequence[str] = ()) -> Backend:
        """The backend that does this.

        Args:
            request: what is asked.
            name: a backend, or ``auto``.
            order: names that ``auto`` tries before the rest, since the op knows what is fastest for these sizes.

        Raises:
            BackendError: the name is unknown or cannot do this; or none can (each with its reason).
        """
        if name != "auto":
            chosen = self[name]
            reason = chosen.refusal(request)
            if reason is None:
                return chosen
            raise BackendError(f"{self.op}: backend {name!r} {reason}. backend='auto' takes one that can", reason)
        ranked = sorted(self._known.values(), key=lambda b: not b.automatic)
        reasons = []
        for backend in [*(self[n] for n in order), *ranked]:
            reason = backend.refusal(request)
            if reason is None:
                return backend
            reasons.append(f"{backend.name!r} {reason}")
        raise BackendError(f"{self.op}: no backend can do this: " + "; ".join(dict.fromkeys(reasons)))

    def describe(self, device: str = "cpu") -> list[dict[str, str]]:
        """A row for each backend, for `mmlong doctor`: ``op, backend, usable`` (``yes`` or ``no``), ``reason, note``."""
        rows = []
        for b in self._known.values():
            there, reason = b.available()
            if b.devices is not None and device not in b.devices:
                there, reason = False, f"runs on {_list(b.devices)} only"
            elif there and b.backward is not None and device not in b.backward:
                reason = f"{reason}; no gradient on {device}"
            usable = "yes" if there else "no"
            rows.append({"op": self.op, "backend": b.name, "usable": usable, "reason": reason, "note": b.note})
        return rows


_OPS: dict[str, Backends] = {}


def describe(device: str = "cpu") -> list[dict[str, str]]:
    """The backends of every op that has been imported; see :meth:`Backends.describe`."""
    return [row for backends in _OPS.values() for row in backends.describe(device)]


@contextlib.contextmanager
def taken() -> Iterator[list[tuple[str, str]]]:
    """The ``(op, backend)`` of every choice made inside, in order: for `mmlong doctor`, which runs a mixer and looks.

    It stands in for :meth:`Backends.choose` and :meth:`Backends.portable` meanwhile, so that a choice costs nothing more when nobody looks.
    """
    found: list[tuple[str, str]] = []
    choose, portable = Backends.choose, Backends.portable

    def noted(self: Backends, request: Request, name: str = "auto", order: Sequence[str] = ()) -> Backend:
        chosen = choose(self, request, name, order)
        found.append((self.op, chosen.name))
        return chosen

    def noted_portable(self: Backends) -> Backend:
        found.append((self.op, "portable"))
        return portable(self)

    Backends.choose, Backends.portable = noted, noted_portable  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Backends.choose, Backends.portable = choose, portable  # type: ignore[method-assign]


@lru_cache(maxsize=16)
def cuda_package(modules: tuple[str, ...], extra: str) -> tuple[bool, str]:
    """Whether one of some packages is installed and torch sees a CUDA device; without importing any of them.

    Args:
        modules: top-level names, any of which will do.
        extra: of this project, which installs one.
    """
    found = [m for m in modules if importlib.util.find_spec(m) is not None]
    if not found:
        return False, f"needs {' or '.join(modules)}, not installed: pip install 'mmlong[{extra}]'"
    if not torch.cuda.is_available():
        return False, f"{found[0]} is installed, but torch sees no CUDA device"
    return True, f"{found[0]} is installed"


def load(module: str, package: str, op: str, backend: str) -> Any:
    """Import a module of an optional package that is installed.

    Raises:
        BackendError: it cannot be imported, e.g. because it was built for another torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{op}: backend {backend!r} needs {module}, and importing it fails: {error}. Install {package} anew for this torch and CUDA, "
            "uninstall it, or ask for backend='portable'"
        ) from error


def span(*tensors: Tensor) -> int:
    """Elements of memory from the first to the last of a tensor, of the one with most: what kernels that count in 32 bits must reach."""
    return max(
        (1 + sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t.numel()),
        default=0,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(words: Any) -> str:
    return ", ".join(sorted(words))
