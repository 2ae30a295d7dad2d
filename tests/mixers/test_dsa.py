"""DeepSeek Sparse Attention: against flash-linear-attention, and what trains its indexer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.mixers.dsa import DSA
from mmlong.ops.rotary import rotary_reference


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


def parts(m: DSA, x: Tensor) -> tuple[Tensor, ...]:
    """``q, k, v`` and those of the indexer, tokens before heads."""
    q, k, v = (w(x).unflatten(-1, (-1, m.head_dim)) for w in (m.q_proj, m.k_proj, m.v_proj))
    u, z = m.index_q_proj(x).unflatten(-1, (m.index_heads, -1)), m.index_k_proj(x)[:, :, None]
    if m.rope:
        q, k, u, z = (rotary_reference(t, torch.arange(x.shape[1]), m.rope_base) for t in (q, k, u, z))
    return q, k, v, u, z[:, :, 0], m.index_w_proj(x)


@pytest.mark.parametrize(
    ("L", "options"),
    [
        (90, {"heads": 4, "kv_heads": 2, "topk": 10, "index_heads": 12}),
        (64, {"heads": 2, "topk": 1, "index_heads": 9, "index_dim": 5, "rope": False, "bias": True}),
        (33, {"heads": 3, "kv_heads": 1}),
    ],
    ids=str,
)
@pytest.mark.oracle("fla: naive_dsa", "dsa")
def test_against_fla(held: Any, L: int, options: dict[str, Any]) -> None:
    """With so many heads of the indexer that no score is the 0 of a key that none of them likes: it leaves open which of equals are taken."""
    fla = pytest.importorskip("fla.ops.dsa.naive")
    torch.manual_seed(0)
    m = DSA(24, **options)
    x = tokens(2, L, 24).requires_grad_()
    q, k, v, u, z, w = parts(m, x)
    r = m.heads // m.kv_heads
    # It makes its output like v, so that both have as many heads.
    k, v = (t.repeat_interleave(r, 2) for t in (k, v))
    want = m.out_proj(fla.naive_dsa(q, k, v, u, z, w, topk=m.topk).flatten(2))
    got, _ = m(x)
    held(x, (got, None), (want, None))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    leaves = [x, *(p for n, p in m.named_parameters() if "index" not in n)]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_outputs_teach_the_indexer_nothing_and_its_loss_only_the_indexer() -> None:
    torch.manual_seed(0)
    m = DSA(16, heads=2, topk=5)
    x = tokens(1, 40, 16).requires_grad_()
    m(x)[0].square().sum().backward()
    taught = {n for n, p in m.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert taught == {f"{n}_proj.weight" for n in ("q", "k", "v", "out")}
    assert all(p.grad is not None for p in m.parameters()), "a step on several ranks waits for every parameter"
    m.zero_grad()
    x.grad = None
    m.indexer_loss(x).backward()
    assert x.grad is None
    assert {n for n, p in m.named_parameters() if p.grad is not None} == {f"index_{s}_proj.weight" for s in "qkw"}


@pytest.mark.parametrize("dense", [True, False])
def test_its_loss_brings_the_indexer_to_the_attention(dense: bool) -> None:
    """After some steps the keys selected hold more of the attention's weight than those of an indexer as it was drawn."""
    torch.manual_seed(0)
    m = DSA(16, heads=2, topk=8)
    x = tokens(2, 64, 16)
    with torch.no_grad():
        m.q_proj.weight *= 3
    opt = torch.optim.Adam([p for n, p in m.named_parameters() if "index" in n], lr=2e-2)
    exact = create_mixer("attention", 16, heads=2)
    exact.load_state_dict({n: p for n, p in m.state_dict().items() if "index" not in n})
    with torch.no_grad():
        before = (m(x)[0] - exact(x)[0]).square().mean()
    losses = []
    for _ in range(60):
        loss = m.indexer_loss(x, dense=dense)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        after = (m(x)[0] - exact(x)[0]).square().mean()
    assert after < 0.8 * before


def test_keys_that_no_head_likes_are_taken_in_their_order() -> None:
    """Scores of exactly 0: whole and in pieces the first of them."""
    torch.manual_seed(0)
    m = DSA(8, heads=2, topk=6, index_heads=1, index_dim=1, rope=False).double()
    x = tokens(1, 60, 8, torch.float64)
    y, _ = m(x)
    state, found = None, []
    for piece in x.split(7, 1):
        part, state = m(piece, state)
        found.append(part)
    torch.testing.assert_close(torch.cat(found, 1), y)
    u, z, w = parts(m, x)[3:]
    by = (w[0] * (u[0, :, 0] @ z[0].T).relu()).masked_fill(torch.ones(60, 60, dtype=torch.bool).triu(1), -torch.inf)
    taken = by.sort(dim=-1, descending=True, stable=True).indices[:, :6]
    assert bool((by.gather(1, taken)[30:] == 0).any()), "no tie to decide"


def test_sizes_of_the_report() -> None:
    m = create_mixer("dsa", 256)
    assert (m.topk, m.index_heads, m.index_dim) == (2048, 4, 64)
    assert m.state_bytes(10) == 10 * 4 * (2 * 256 + 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"topk": 0}, "topk must be at least 1"), ({"index_heads": 0}, "index_heads"), ({"index_dim": 0}, "index_dim")],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("dsa", 64, **options)
