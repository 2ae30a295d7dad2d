"""Following a step without computing it: hollow tensors, real ones whose memory nobody writes to.

Under :class:`Hollow` every tensor that the given ones (the parameters) have touched is hollow. An operator on hollow tensors is not run: its outputs are allocated, of the sizes that torch's own meta kernels
say, and left as they are, so they take address space and no memory. Everything else runs: raw data, tokens, lengths, masks and random choices have their values, and code that looks at those still can. Views
run too. Beside ``FakeTensorMode``, which knows more and takes some ten times as long, what is kept is exactly what autograd, hooks and hand-written functions do on the CPU: the tensors are
plain CPU tensors, and take the paths of plain CPU tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
import torch._meta_registrations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mmlong.measure.flops import asks_about_form
from mmlong.ops.known import unknown_values

_aten: Any = torch.ops.aten
_NATIVE = {_aten._unsafe_view.default, _aten.lift_fresh.default}
"""Views that do not say so."""
_MADE = {
    getattr(_aten, name).default
    for name in ("new_full", "new_zeros", "new_ones", "new_empty", "full_like", "zeros_like", "ones_like", "empty_like")
}
"""Take sizes from a tensor and no values."""
_VALUES = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}

Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Hollow(TorchDispatchMode):
    """While it is entered, what comes of some tensors is not computed.

    Args:
        tensors: hollow from the beginning; they are not written to.

    Code that does less work for some values asks :func:`mmlong.ops.known.values_known` first, and is counted for the worst of them. Code whose sizes are values asks :func:`mmlong.ops.known.followed`, supposes some, and says which in an attribute ``counted_as`` of its module.

    Raises:
        ValueError: in use, where code looks at a value that was not computed.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._hollow: dict[int, weakref.ref[Any]] = {}
        self._forms: dict[Any, tuple[list[Any], Any]] = {}
        self._within: list[AbstractContextManager[None]] = []
        for t in tensors:
            self._mark(t)

    def __enter__(self) -> Self:
        self._within.append(unknown_values())
        self._within[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._within.pop().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if asks_about_form(func):
            return NotImplemented
        leaves, spec = tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        hollow = any(t.untyped_storage()._cdata in self._hollow for t in given)
        if not hollow or func in _NATIVE or func.is_view:
            return func(*args, **kwargs)
        if func in _MADE and not _real(kwargs.get("dtype") or args[0].dtype):
            # Counts and positions, which code looks at.
            return func(*args, **kwargs)
        if func in _VALUES:
            raise ValueError(
                f"the step looks at a value that it computes from the parameters ({func}), which following it without computing cannot know"
            )
        if func._schema.is_mutable:
            return self._written(func, args, kwargs)
        if func in _INDEXED:
            # How many a mask picks is known by its values alone.
            leaves, spec = tree_flatten((_numbered(args), kwargs))
        key = (func, spec, *[_form(leaf) if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves])
        known = self._forms.get(key)
        if known is None:
            known = self._forms[key] = _forms_of(func, leaves, spec)
        made, out = known
        return tree_unflatten([self._made(form) if isinstance(form, tuple) else form for form in made], out)

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator that writes to its arguments returns: those, now hollow."""
        written: list[Any] = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs[argument.name] if argument.name in kwargs else args[place] if place < len(args) else None
                if value is not None:
                    tree_map(lambda t: self._mark(t) if isinstance(t, Tensor) else None, value)
                    written.append(value)
        returns = len(func._schema.returns)
        if returns == 0:
            return None
        if returns != len(written):
            raise ValueError(
                f"{func} writes to {len(written)} of its arguments and returns {returns}; it cannot be followed"
            )
        return written[0] if returns == 1 else tuple(written)

    def _made(self, form: Form) -> Tensor:
        size, stride, dtype = form
        t = torch.empty_strided(size, stride, dtype=dtype)
        self._mark(t)
        return t

    def _mark(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._hollow:
            self._hollow[key] = weakref.ref(storage, self._forget(key))

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._hollow.pop(key, None)

        return forget


def _real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _form(t: Tensor) -> Form:
    return tuple(t.shape), t.stride(), t.dtype


def _plain(leaf: Any) -> Any:
    # 1, 1.0 and True are equal keys and not equal arguments.
    return (
        (type(leaf), leaf)
        if isinstance(leaf, (bool, int, float))
        else id(leaf)
        if isinstance(leaf, torch.Generator)
        else leaf
    )


def _numbered(args: Any) -> Any:
    """Arguments of an indexing operator with masks turned into the indices that they pick."""
    self, indices, *rest = args
    numbers: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            numbers += index.nonzero().unbind(1)
        else:
            numbers.append(index)
    return self, numbers, *rest


def _forms_of(func: Any, leaves: list[Any], spec: Any) -> tuple[list[Any], Any]:
    """The outputs' forms, and how they are put together, by the operator's meta kernel."""

    def empty(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            size, stride, dtype = _form(leaf)
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return (
            torch.device("meta")
            if isinstance(leaf, torch.device)
            else None
            if isinstance(leaf, torch.Generator)
            else leaf
        )

    args, kwargs = tree_unflatten([empty(leaf) for leaf in leaves], spec)
    try:
        out = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{func} cannot be followed without computing it: {error}") from error
    values, form = tree_flatten(out)
    return [_form(value) if isinstance(value, Tensor) else value for value in values], form
