"""What layers around one long filter a channel share: the convolution, a skip, and a gated projection.

    out = GLU(W gelu(k conv x + D x) + b)

as in S4D's layer, which both Long Conv (arXiv 2302.06646) and SGConv (arXiv 2210.09298) put their filters into. The convolution is causal, by
:mod:`mmlong.ops.long_conv`. A filter is a function of the absolute lag and is zero from ``max_length`` on, without which a sequence in pieces could not
equal the whole; the state is the past inputs that it still reaches.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer
from mmlong.mixers.state import State
from mmlong.ops.long_conv import least, long_conv

LAGS = 1024
"""Kept filters have this many lags at least, and then twice as many whenever they are too few."""


class LongFilter(Mixer):
    """A layer of one filter a channel; subclasses make the filters, and draw their initial values in ``reset_parameters``.

    Args:
        dim: width D.
        causal: always true.
        max_length: lags that a filter has.
        name: of the mixer, for errors.

    Raises:
        ValueError: ``max_length`` below 1.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"D": {"weight_decay": 0.0}}

    def __init__(self, dim: int, *, causal: bool, max_length: int, name: str) -> None:
        super().__init__(dim, causal=causal)
        if max_length < 1:
            raise ValueError(f"{name}: max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.D = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)
        self._kept: tuple[list[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has parameters of its own, to which kept filters do not belong.
        return {**self.__dict__, "_kept": None}

    def filters(self, lags: int, dtype: torch.dtype | None = None) -> Tensor:
        """The filters at lags ``0 .. lags - 1``, of which there are at most ``max_length``: ``(lags, D)``, at least float32 unless ``dtype``.

        The value at a lag must not depend on how many there are.
        """
        raise TypeError(f"{type(self).__name__} does not define filters(lags, dtype)")

    def sources(self) -> list[Tensor]:
        """What the filters are made from."""
        raise TypeError(f"{type(self).__name__} does not define sources()")

    def _filters(self, lags: int, dtype: torch.dtype) -> Tensor:
        """:meth:`filters`, kept from call to call while nothing is trained, so that a token does not make them anew."""
        sources = [t.detach() for t in self.sources()]
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or sources[0].is_meta:
            self._kept = None
            return self.filters(lags, dtype)
        if self._kept is not None:
            made_from, kept = self._kept
            # By their values, since a write through `.data` (as averaged weights are swapped in) leaves no trace in a version or an address.
            same = kept.dtype == dtype and all(
                a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
                for a, b in zip(made_from, sources, strict=True)
            )
            if same and kept.shape[0] >= lags:
                return kept[:lags]
        many = min(self.max_length, max(LAGS, 1 << (lags - 1).bit_length()))
        self._kept = ([t.clone() for t in sources], self.filters(many, dtype).contiguous())
        return self._kept[1][:lags]

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * min(length, self.max_length - 1)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        past = None if state is None else state["past"]
        seen = 0 if past is None else past.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            k = self._filters(least(self.max_length, seen + x.shape[1]), dtype)
        y, past = long_conv(x, k, past, layout, self.max_length)
        y = F.gelu(torch.addcmul(y, x, self.D.to(x.dtype)))
        return F.glu(self.out_proj(y), dim=-1), {"past": past}
