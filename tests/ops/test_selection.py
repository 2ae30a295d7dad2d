"""Attention among sorted tokens against its definition by the full matrix, and the last members of groups against counting them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.ops import members
from mmlong.ops.members import member_attention, members_seen
from mmlong.ops.selection import (
    chunk_codes,
    inverse_of,
    member_codes,
    order_by,
    selected_attention,
    selected_reference,
)
from mmlong.ops.tiled_attention import HIDDEN


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(R: int, B: int, H: int, S: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(count, (R, B, H, S), generator=torch.Generator().manual_seed(seed))


def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], leaves: list[Tensor]) -> None:
    """Where a query meets anything: outputs, sums and the gradients of a random function of the outputs."""
    met = want[1] > HIDDEN / 2
    assert torch.equal(got[1] > HIDDEN / 2, met)
    torch.testing.assert_close(got[1][met], want[1][met])
    weights = draw(*want[0].shape, seed=9) * met[..., None]
    torch.testing.assert_close(got[0] * met[..., None], want[0] * met[..., None])
    found, expected = (torch.autograd.grad((y * weights).sum(), leaves) for y, _ in (got, want))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("S", [1, 7, 8, 9, 61])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("without_self", [True, False])
def test_chunks_of_equal_keys(S: int, once: bool, without_self: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.ops.block_attention.TILE_ELEMENTS", 400)
    B, H, m = 2, 3, 4
    q, k = (draw(B, H, S, 5, seed=n).requires_grad_() for n in (1, 2))
    v = draw(B, H, S, 6, seed=3).requires_grad_()
    groups = groups_of(3, B, H, S, 4)
    order = order_by(groups)
    options: dict[str, Any] = {"scale": 0.7, "without_self": without_self, "once": once}
    args = (q, k, v, order, chunk_codes(groups, order, m), m, (0, 1))
    want = selected_reference(*args, **options)
    # The codes say what is said of buckets and chunks.
    chunk = inverse_of(order, S) // m
    apart = chunk[..., :, None] - chunk[..., None, :]
    met = (groups[..., :, None] == groups[..., None, :]) & (apart >= 0) & (apart <= 1)
    count = met.sum(0).double()
    count = count.clamp_max(1) if once else count
    if without_self:
        count = count * (1 - torch.eye(S, dtype=count.dtype))
    scores = 0.7 * q @ k.mT + count.log()
    torch.testing.assert_close(want[1].clamp_min(-1e20), scores.logsumexp(-1).clamp_min(-1e20))
    agree(selected_attention(*args, **options), want, [q, k, v])


def test_tokens_in_no_order_are_met_by_nobody() -> None:
    q, k, v = (draw(1, 2, 20, 4, seed=n).requires_grad_() for n in (1, 2, 3))
    groups = groups_of(2, 1, 2, 20, 3)
    order = order_by(groups)[..., torch.arange(0, 20, 2)]
    args = (q, k, v, order, member_codes(groups, order, 4), 4, (0, 3))
    want = selected_reference(*args, scale=1.0)
    left_out = torch.ones(2, 1, 2, 20, dtype=torch.bool).scatter_(-1, order, False).all(0)
    assert bool(left_out.any())
    assert torch.equal(want[1] < HIDDEN / 2, left_out)
    agree(selected_attention(*args, scale=1.0), want, [q, k, v])


def counted(groups: Tensor, T: int, reach: int, with_self: bool) -> Tensor:
    """Which keys the last ``T`` see, by going back from each."""
    R, B, H, S = groups.shape
    seen = torch.zeros(B, H, T, S, dtype=torch.bool)
    for r, b, h, t in torch.cartesian_prod(*[torch.arange(n) for n in (R, B, H, T)]).tolist():
        i, left = S - T + t, reach
        for j in range(i if with_self else i - 1, -1, -1):
            if groups[r, b, h, j] == groups[r, b, h, i] and left:
                seen[b, h, t, j] = True
                left -= 1
    return seen


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 40), (5, 40), (12, 40), (40, 40), (30, 90)])
@pytest.mark.parametrize("with_self", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_last_members(T: int, S: int, with_self: bool, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "FEW", 5)
    reach, count = 4, 3
    q = draw(2, 2, T, 5, seed=1).requires_grad_()
    k, v = (draw(2, 2, S, 5, seed=n).requires_grad_() for n in (2, 3))
    groups = groups_of(rounds, 2, 2, S, count)
    seen = counted(groups, T, reach, with_self)
    assert torch.equal(members_seen(groups, T, reach, with_self).any(0), seen)
    scores = (0.7 * q @ k.mT).masked_fill(~seen, HIDDEN)
    want = scores.softmax(-1) @ v, scores.logsumexp(-1)
    agree(member_attention(q, k, v, groups, count, reach, scale=0.7, with_self=with_self), want, [q, k, v])


def test_what_does_not_fit_is_refused() -> None:
    q = draw(1, 1, 4, 2)
    order = torch.arange(4).view(1, 1, 1, 4)
    with pytest.raises(ValueError, match="groups and a reach of 1000000 make codes up to"):
        many = draw(1, 1, 9, 2)
        member_attention(many, many, many, groups_of(1, 1, 1, 9, 3), 200, 1_000_000, scale=1.0, with_self=True)
    with pytest.raises(ValueError, match="do not fit"):
        selected_attention(q, q[:, :, :3], q, order, order.int(), 2, (0, 1), scale=1.0)
