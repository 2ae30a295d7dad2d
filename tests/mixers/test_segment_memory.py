"""Transformer-XL and the Compressive Transformer: against their definition pair by pair, against an implementation of others, and what each gradient reaches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer
from mmlong.mixers.own_loss import mean_own_loss, own_losses

XL: dict[str, Any] = {"heads": 2, "segment": 6, "memory": 10}
FAR: dict[str, Any] = {"heads": 2, "segment": 6, "memory": 9, "compressed": 4, "rate": 3}


def build(name: str, dim: int = 8, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer(name, dim, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    return m


def compressed(m: Any, x: Tensor) -> Tensor:
    """Slots of the tokens ``(T, D)`` one by one, as far as their groups are whole."""
    c, found = m.rate, []
    for s in range(x.shape[0] // c):
        group = x[s * c : (s + 1) * c]
        if m.compress.kind == "mean":
            found.append(group.mean(0))
        elif m.compress.kind == "max":
            found.append(group.amax(0))
        else:
            step = 2 if m.compress.kind == "dilated_conv" else 1
            end, total = (s + 1) * c - 1, m.compress.conv.bias
            for tap in range(c):
                at = end - step * (c - 1 - tap)
                if at >= 0:
                    total = total + m.compress.conv.weight[:, :, tap] @ x[at]
            found.append(total)
    # Of no slot the gradient is zero and not none.
    none = x.new_zeros(0, x.shape[1]) + sum(0 * p.sum() for p in m.compress.parameters())
    return torch.stack(found) if found else none


def seen_by(m: Any, x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the query ``i`` sees: compressed slots, memory, its own segment, in order."""
    a = i // m.segment * m.segment
    gone = max(0, a - m.memory)
    fixed = x if m.exact else x.detach()
    far = compressed(m, x.detach())[: gone // m.rate][-m.compressed :] if m.compressed else x[:0]
    # Without its gradient, which is zero and not none.
    return far.detach() + 0 * far, fixed[gone:a], x[a : i + 1]


def by_definition(m: Any, x: Tensor) -> Tensor:
    """One document ``(T, D)``, pair by pair."""
    H, d, pos = m.heads, m.head_dim, m.positions
    rows = []
    for i in range(x.shape[0]):
        h = torch.cat(seen_by(m, x, i))
        q, k, v = m.q_proj(x[i]).view(H, d), m.k_proj(h).view(-1, H, d), m.v_proj(h).view(-1, H, d)
        distance = torch.arange(h.shape[0] - 1, -1, -1)
        angle = distance[:, None].double() / pos.base ** (torch.arange(0, m.dim, 2).double() / m.dim)
        r = pos.proj(torch.cat([angle.sin(), angle.cos()], -1)).view(-1, H, d)
        scores = torch.einsum("hd,jhd->hj", q + pos.content_bias, k) + torch.einsum("hd,jhd->hj", q + pos.place_bias, r)
        rows.append(torch.einsum("hj,jhd->hd", (scores / math.sqrt(d)).softmax(-1), v).flatten())
    return m.out_proj(torch.stack(rows))


@pytest.mark.parametrize("length", [5, 6, 18, 41])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.oracle("definition: pair by pair, gradient stopped", "transformer_xl")
def test_transformer_xl_is_its_definition(same_as: Any, length: int, exact: bool) -> None:
    m = build("transformer_xl", **XL, exact=exact)
    x = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_definition(m, x[0])[None], None))


@pytest.mark.parametrize("length", [6, 18, 50])
@pytest.mark.parametrize("kind", ["mean", "max", "conv", "dilated_conv"])
@pytest.mark.oracle("definition: pair by pair, gradient stopped", "compressive")
def test_compressive_is_its_definition(same_as: Any, length: int, kind: str) -> None:
    m = build("compressive", **FAR, compression=kind)
    x = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_definition(m, x[0])[None], None))


@pytest.mark.parametrize("kind", ["conv", "dilated_conv"])
def test_its_loss_is_the_papers_and_teaches_the_compression_alone(kind: str) -> None:
    m = build("compressive", **FAR, compression=kind, reconstruction=0.5).train()
    x = torch.randn(1, 31, 8, dtype=torch.float64, requires_grad=True)
    with own_losses() as found:
        m(x)
    got = mean_own_loss(found)
    total = 0.0
    slots = compressed(m, x[0].detach())
    for i in range(31):
        a = i // m.segment * m.segment
        first, last = max(0, a - m.memory), max(0, a + m.segment - m.memory)
        if first == last:
            continue
        q = m.q_proj(x[0, i]).view(2, -1)

        def read(h: Tensor, q: Tensor = q) -> Tensor:
            k, v = m.k_proj(h).view(-1, 2, 4), m.v_proj(h).view(-1, 2, 4)
            return torch.einsum("hj,jhd->hd", (torch.einsum("hd,jhd->hj", q, k) / 2).softmax(-1), v)

        total += (read(x[0, first:last]) - read(slots[first // 3 : last // 3])).square().mean()
    torch.testing.assert_close(got, 0.5 * total / 31)
    got.backward()
    taught = {name for name, p in m.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert taught == {"compress.conv.weight", "compress.conv.bias"}
    assert x.grad is None or not bool(x.grad.any())


def test_its_loss_is_the_same_in_pieces_and_in_a_batch_of_documents() -> None:
    m = build("compressive", **FAR).train()
    x = torch.randn(2, 40, 8, dtype=torch.float64)

    def loss(*calls: tuple[Tensor, Layout | None]) -> Tensor:
        state: Any = None
        with own_losses() as found:
            for piece, layout in calls:
                _, state = m(piece, state, layout)
        return sum(total for _, total, _ in found) / sum(tokens for _, _, tokens in found)

    whole = loss((x, None))
    torch.testing.assert_close(loss(*((p, None) for p in x.split([1, 5, 17, 6, 11], 1))), whole)
    resets = torch.zeros(1, 80, dtype=torch.bool)
    resets[0, 40] = True
    torch.testing.assert_close(loss((x.reshape(1, 80, 8), Layout(resets=resets))), whole)


def test_gradient_stops_at_the_memory_or_goes_on() -> None:
    for exact in (False, True):
        m = build("transformer_xl", **XL, exact=exact)
        x = torch.randn(1, 24, 8, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(m(x)[0][0, 20].sum(), x)
        touched = g[0].abs().sum(-1).nonzero().flatten().tolist()
        assert touched == list(range(8 if exact else 18, 21))


@pytest.mark.parametrize(
    "far",
    [
        pytest.param(True, marks=pytest.mark.oracle("compressive-transformer-pytorch", "compressive")),
        pytest.param(False, marks=pytest.mark.oracle("compressive-transformer-pytorch", "transformer_xl")),
    ],
)
def test_against_compressive_transformer_pytorch(held: Any, far: bool) -> None:
    """Segment by segment, its states handed on; its positions are a table, which is left at zero, as ours are."""
    from compressive_transformer_pytorch.compressive_transformer_pytorch import SelfAttention

    torch.manual_seed(0)
    n, c = 8, 4
    theirs = SelfAttention(16, n, n, 4 if far else 0, c, heads=2).double().eval()
    options = {"heads": 2, "segment": n, "memory": n, "bias": False}
    m = build("compressive", 16, **options, compressed=4, rate=c) if far else build("transformer_xl", 16, **options)
    with torch.no_grad():
        m.q_proj.weight.copy_(theirs.to_q.weight)
        k, v = theirs.to_kv.weight.chunk(2)
        m.k_proj.weight.copy_(k)
        m.v_proj.weight.copy_(v)
        m.out_proj.weight.copy_(theirs.to_out.weight)
        theirs.to_out.bias.zero_()
        for p in m.positions.parameters():
            p.zero_()
        if far:
            m.compress.conv.load_state_dict(theirs.compress_mem_fn.conv.state_dict())
    x = torch.randn(2, 7 * n, 16, dtype=torch.float64, requires_grad=True)
    outs, memories = [], None
    for piece in x.split(n, 1):
        y, memories, _ = theirs(piece, memories=memories)
        # Theirs is detached by the model around it.
        memories = tuple(t.detach() for t in memories)
        outs.append(y)
    got, want = m(x)[0], torch.cat(outs, 1)
    held(x, (got, None), (want, None))
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_its_loss_against_theirs() -> None:
    """Where memory and segment are of one length, they are the same."""
    from compressive_transformer_pytorch.compressive_transformer_pytorch import SelfAttention

    torch.manual_seed(0)
    n, c = 8, 4
    theirs = SelfAttention(16, n, n, 8, c, heads=2).double().train()
    m = build("compressive", 16, heads=2, segment=n, memory=n, compressed=8, rate=c).train()
    with torch.no_grad():
        m.q_proj.weight.copy_(theirs.to_q.weight)
        for mine, there in zip((m.k_proj, m.v_proj), theirs.to_kv.weight.detach().chunk(2), strict=True):
            mine.weight.copy_(there)
        m.compress.conv.load_state_dict(theirs.compress_mem_fn.conv.state_dict())
    x = torch.randn(2, 3 * n, 16, dtype=torch.float64)
    losses, memories = [], None
    for piece in x.split(n, 1):
        _, memories, loss = theirs(piece, memories=memories)
        losses.append(loss)
    with own_losses() as found:
        m(x)
    torch.testing.assert_close(mean_own_loss(found), (sum(losses) / 3).reshape(()))


def test_a_segment_of_one_piece_after_another_needs_no_more_than_it_says() -> None:
    m = build("compressive", **FAR, compression="dilated_conv")
    state = None
    for n in range(1, 60):
        _, state = m(torch.randn(1, 1, 8, dtype=torch.float64), state)
        held = sum(t[0].numel() * 4 for key, t in state.items() if key != "seen")
        assert held == m.state_bytes(n)
    # Memory and open segment, once more without gradient; raw for what is let go next; slots.
    assert max(m.state_bytes(n) for n in range(60, 80)) == 4 * 8 * (2 * (9 + 6) + 2 * 6 + (9 + 6 + 2) + 2 * 4)


def test_impossible_options() -> None:
    for options, message in (
        ({"memory": 4, "segment": 6, "rate": 2}, "memory must be at least the segment"),
        ({"memory": 12, "segment": 6, "rate": 4}, "4 must divide segment 6"),
        ({"compression": "most_used"}, "one of mean, max, conv, dilated_conv"),
        ({"compressed": 0}, "without it is transformer_xl"),
        ({"reconstruction": -1.0}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("compressive", 8, **options)
    with pytest.raises(ValueError, match="segment, memory and rate must be at least 1"):
        create_mixer("transformer_xl", 8, segment=0)
