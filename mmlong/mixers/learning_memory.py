"""The frame of mixers whose state is a network that learns on the sequence by mini-batches (:mod:`mmlong.ops.test_time`).

They count each document's tokens, since mini-batches follow it from its first one on: an integer in the state, which blocks of tokens do not carry; they are told each token's index in its document by their
layout's positions. Blocks are short, since a loop that is differentiated keeps its network at every mini-batch, and hold all rows of a batch, since rows go through the loop side by side; on every device,
since the loop takes one mini-batch after another on all.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout, document_index
from mmlong.mixers.cell import CellMixer, Tensors
from mmlong.mixers.state import State
from mmlong.mixers.weights import named_weights
from mmlong.ops.blockwise import blockwise
from mmlong.ops.kv_cache import counts_after
from mmlong.ops.test_time import Layers

BLOCK_TOKENS = 1024
"""Tokens of each row in a block."""


class LearningMemory(CellMixer):
    """Subclasses make ``layers`` initial networks and define :meth:`cell`, whose layout has each token's index in its document as positions.

    Attributes:
        mini_batch: tokens of a mini-batch.
        heads: networks side by side.
        sizes: inputs (with one more for a bias) and outputs of each layer.
        parts: names of the network's copies in the state; of these ``begun`` begin as the initial network, the others at zero.
    """

    mini_batch: int
    heads: int
    sizes: list[tuple[int, int]]
    parts: tuple[str, ...]
    begun: tuple[str, ...]

    def make_network(self, widths: list[int], bias: bool) -> None:
        """Parameters of the network that every document begins with: ``network.0``, ... ``(H, N, P)``."""
        self.sizes = [(n + bias, p) for n, p in itertools.pairwise(widths)]
        self.network = nn.ParameterList([nn.Parameter(torch.zeros(self.heads, n, p)) for n, p in self.sizes])

    def first(self, w: Tensors) -> Layers:
        """The network that a document begins with."""
        return tuple(w[f"network.{j}"] for j in range(len(self.sizes)))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{part}.{j}": (self.heads, *size) for part in self.parts for j, size in enumerate(self.sizes)}

    def layers_of(self, state: Tensors, part: str) -> Layers:
        return tuple(state[f"{part}.{j}"] for j in range(len(self.sizes)))

    def initial_state(self, x: Tensor) -> Tensors:
        state = super().initial_state(x)
        for part in self.begun:
            for j, W in enumerate(self.network):
                name = f"{part}.{j}"
                state[name] = W.to(state[name].dtype).expand_as(state[name])
        return state

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) + 8

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        B, L, _ = x.shape
        if state is None:
            passed = torch.zeros(B, dtype=torch.int64, device=x.device)
            before = self.initial_state(x)
        else:
            passed = state["passed"]
            before = {name: t for name, t in state.items() if name != "passed"}
        index = document_index(passed, L, layout)
        weights = {name: w for name, w in named_weights(self).items() if name != "out_proj.weight"}
        piece = partial(self._piece, tuple(before), tuple(weights))
        inner = Layout(
            lengths=None if layout is None else layout.lengths,
            resets=None if layout is None else layout.resets,
            positions=index[..., None],
        )
        step = max(1, BLOCK_TOKENS // self.mini_batch) * self.mini_batch
        states, parameters = tuple(before.values()), tuple(weights.values())
        if torch.compiler.is_compiling() or step >= L:
            y, after = piece(x, states, parameters, inner)
            y = F.linear(y, self.out_proj.weight)
        else:
            y, after = blockwise(piece, x, states, parameters, inner, B * step, self.out_proj.weight)
        if state is not None and torch.is_grad_enabled():
            # Where no document begins, the first network's gradient is zero, not missing: over ranks, all have one.
            y = y + 0 * sum(W.sum() for W in self.network).to(y.dtype)
        left = dict(zip(before, after, strict=True))
        # Where the mini-batch stands is all that is asked of the count.
        left["passed"] = counts_after(layout, L, passed) % self.mini_batch
        return y, left


def index_of(layout: Layout | None) -> Tensor:
    """Index of each token in its document, int64 ``(B, L)``, as :meth:`LearningMemory.mix` tells it."""
    assert layout is not None
    assert layout.positions is not None
    return layout.positions[..., 0]
