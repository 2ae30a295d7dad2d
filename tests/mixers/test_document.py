"""Documents as rows of their own: a mixer that counts from a document's first token keeps the whole contract."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.testing import check_mixer

BLOCK = 5


class BlockMean(DocumentMixer):
    """The mean of what came so far in a block of five, and of all the blocks that are over: both kinds of cache, bounded and growing."""

    def __init__(self, dim: int, *, causal: bool = True) -> None:
        super().__init__(dim, causal=causal)
        self.proj = nn.Linear(dim, dim)
        self.calls: list[tuple[int, int, int]] = []

    def slots(self, seen: int) -> dict[str, int]:
        return {"open": seen % BLOCK, "means": seen // BLOCK}

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * sum(self.slots(length).values()) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        self.calls.append((*x.shape[:2], past))
        N, T, D = x.shape
        x = self.proj(x)
        if not self.causal:
            return x.mean(1, keepdim=True).expand_as(x), None
        before = x.new_zeros(N, 0, D) if state is None else state["open"]
        means = x.new_zeros(N, 0, D) if state is None else state["means"]
        line = torch.cat([before, x], 1)
        short = -line.shape[1] % BLOCK
        blocks = torch.nn.functional.pad(line, (0, 0, 0, short)).unflatten(1, (-1, BLOCK))
        so_far = blocks.cumsum(2) / torch.arange(1, BLOCK + 1, device=x.device)[:, None]
        full = line.shape[1] // BLOCK
        means = torch.cat([means, so_far[:, :full, -1]], 1)
        earlier = means.cumsum(1) / torch.arange(1, means.shape[1] + 1, device=x.device)[:, None]
        earlier = torch.cat([x.new_zeros(N, 1, D), earlier], 1)
        block = torch.arange(past, past + T, device=x.device) // BLOCK
        y = so_far.flatten(1, 2)[:, before.shape[1] : before.shape[1] + T] + earlier[:, block]
        return y, {"open": line[:, full * BLOCK :].clone(), "means": means}


TRAITS = Traits(paper="none", bidirectional=True, state="growing")
BlockMean.traits = TRAITS


def test_keeps_the_contract() -> None:
    checked = check_mixer(BlockMean, traits=TRAITS)
    assert {"pieces", "padding", "resets", "gradients", "segments", "state", "compile", "export"} <= set(checked)
    check_mixer(BlockMean, traits=TRAITS, options={"causal": False})


def test_documents_alike_are_one_call() -> None:
    m = BlockMean(4)
    x = torch.randn(3, 12, 4)
    resets = torch.zeros(3, 12, dtype=torch.bool)
    resets[0, 4] = resets[0, 8] = resets[1, 6] = resets[2, 0] = resets[2, 8] = True
    m(x, None, Layout(resets=resets))
    assert sorted(m.calls) == [(1, 8, 0), (2, 6, 0), (4, 4, 0)]
    m.calls.clear()
    _, state = m(x[:, :5])
    assert state["seen"].shape == (3, 5, 0)
    m(x[:, 5:], state, Layout(lengths=torch.tensor([7, 0, 7])))
    assert m.calls == [(3, 5, 0), (2, 7, 5)]


def test_rows_without_a_token_have_no_state() -> None:
    m = BlockMean(4)
    y, state = m(torch.randn(2, 3, 4), None, Layout(lengths=torch.tensor([0, 0])))
    assert state is None
    assert bool((y == 0).all())
    y.sum().backward()
    assert all(p.grad is not None and not bool(p.grad.any()) for p in m.parameters())
