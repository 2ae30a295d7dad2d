"""Log-linear attention: levels, blocked, plain and doubling forms against the definition over all pairs, the carry token by token, other people's code, and itself in pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout, document_index
from mmlong.ops import log_linear_attention as op
from mmlong.ops import log_linear_chunks as chunks
from mmlong.ops.fenwick import level, standing, walk
from mmlong.ops.kv_cache import counts_after
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.log_linear_attention import log_linear_attention, log_linear_reference

Outcome = tuple[Tensor, Tensor]
OVER_TIME = ("q", "k", "v", "g", "weights")


def make(
    B: int, L: int, G: int, H: int, N: int, P: int, K: int, *, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    r = torch.Generator().manual_seed(100 * B + L + H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, dtype=dtype)

    inputs = {
        "q": normal(B, L, G, N),
        "k": normal(B, L, G, N) / math.sqrt(N),
        "v": normal(B, L, H, P),
        "g": -0.3 * normal(B, L, H).abs(),
        "weights": normal(B, L, H, K).abs(),
        "state": normal(B, H, K - 1, N, P),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def stood(inputs: dict[str, Any], passed: Tensor) -> dict[str, Any]:
    """With a state of buckets that can have something in them after so many tokens."""
    there = standing(passed, inputs["weights"].shape[-1])[:, None, :, None, None]
    return {**inputs, "state": torch.where(there, inputs["state"], 0)}


def all_pairs(inputs: dict[str, Any], layout: Layout | None = None) -> Tensor:
    """The definition's first line from the beginning, with levels from the digits of Python's integers."""
    q, k, v, g, w = (inputs[name] for name in OVER_TIME)
    B, L, H, K = w.shape
    q, k = (t.repeat_interleave(H // t.shape[2], 2) for t in (q, k))
    index = document_index(torch.zeros(B, dtype=torch.int64), L, layout)
    documents = torch.zeros(B, L) if layout is None or layout.resets is None else layout.resets.long().cumsum(1)
    rows = []
    for b in range(B):
        a = g[b].cumsum(0)
        seen = v.new_zeros(L, L, H)
        for t in range(L):
            for s in range(t + 1):
                if documents[b, t] == documents[b, s]:
                    digits = (int(index[b, t]) ^ int(index[b, s])).bit_length()
                    seen[t, s] = w[b, t, :, min(digits, K - 1)]
        decay = (a[:, None] - a[None]).exp()
        rows.append(torch.einsum("tsh,tsh,thn,shn,shp->thp", seen, decay, q[b], k[b], v[b]))
    return torch.stack(rows)


def assert_same(leaves: dict[str, Any], got: Any, want: Any, **tolerance: float) -> None:
    torch.testing.assert_close(tuple(got), tuple(want), **tolerance)
    r = torch.Generator().manual_seed(7)
    want = [t for t in want if t.is_floating_point()]
    got = [t for t in got if t.is_floating_point()]
    cotangents = [torch.randn(t.shape, generator=r, dtype=t.dtype) for t in want]
    mine, theirs = (
        torch.autograd.grad(both, list(leaves.values()), cotangents, retain_graph=True, allow_unused=True)
        for both in (got, want)
    )
    for name, m, t in zip(leaves, mine, theirs, strict=True):
        if m is not None or t is not None:
            torch.testing.assert_close(m, t, msg=lambda text, name=name: f"gradient of {name}: {text}", **tolerance)


# Levels


def buckets(t: int) -> list[range]:
    """What comes before ``t``, by its binary digits from the greatest."""
    found, start = [], 0
    for b in reversed(range(t.bit_length())):
        if t >> b & 1:
            found.append(range(start, start + (1 << b)))
            start += 1 << b
    return found


def test_levels_are_those_of_a_fenwick_tree() -> None:
    for t in range(130):
        parts = buckets(t)
        assert [s for part in parts for s in part] == list(range(t))
        assert standing(torch.tensor(t), 9).nonzero()[:, 0].tolist() == sorted(
            int(math.log2(len(part))) for part in parts
        )
        for part in parts:
            levels = level(torch.tensor(t), torch.tensor(list(part)), 9)
            assert set(levels.tolist()) == {int(math.log2(len(part))) + 1}
        assert int(level(torch.tensor(t), torch.tensor(t), 9)) == 0


@pytest.mark.parametrize("levels", [2, 3, 5, 9])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 13])
def test_walk(levels: int, T: int) -> None:
    for first in range(40):
        index = torch.arange(first, first + T)
        w = walk(index[None, None], torch.tensor([[first]]), torch.tensor([[first + T]]), levels)

        def at(t: int, s: int) -> int:
            return min((t ^ s).bit_length(), levels - 1)

        for t in range(T):
            assert w.within[0, 0, t, : t + 1].tolist() == [at(first + t, first + s) for s in range(t + 1)]
            assert int(w.to[0, 0, w.slot[0, 0, t]]) == at(first + T, first + t)
        for s in range(first):
            b = at(first, s) - 1
            assert w.before[0, 0, b]
            assert w.read[0, 0, :, b].tolist() == [at(first + t, s) for t in range(T)]
            assert int(w.moved[0, 0, b]) == at(first + T, s)
            assert w.after[0, 0, w.moved[0, 0, b] - 1]


# The op

SIZES = [(1, 70, 1, 1, 3, 2, 9), (2, 37, 1, 2, 4, 3, 4), (3, 21, 2, 4, 2, 5, 2), (2, 1, 1, 2, 3, 3, 5)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk", [1, 5, 8, None])
def test_against_all_pairs(sizes: tuple[int, ...], chunk: int | None) -> None:
    inputs = make(*sizes)
    del inputs["state"]
    got, _, passed = log_linear_attention(**inputs, chunk=chunk)
    assert passed.tolist() == [sizes[1]] * sizes[0]
    assert_same(inputs, [got], [all_pairs(inputs)])


def test_against_all_pairs_of_each_document() -> None:
    inputs = make(2, 41, 1, 2, 3, 2, 5)
    del inputs["state"]
    resets = torch.zeros(2, 41, dtype=torch.bool)
    resets[0, [0, 13, 14, 30]] = resets[1, [3, 9]] = True
    layout = Layout(resets=resets)
    assert_same(inputs, [log_linear_attention(**inputs, layout=layout, chunk=8)[0]], [all_pairs(inputs, layout=layout)])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk", [1, 5, 8])
@pytest.mark.parametrize("begun", ["zero", "alike", "apart"])
def test_blocks_equal_the_carry(sizes: tuple[int, ...], chunk: int, begun: str) -> None:
    B = sizes[0]
    passed = {"zero": torch.zeros(B), "alike": torch.full((B,), 13), "apart": 3 + 11 * torch.arange(B)}[begun].long()
    leaves = make(*sizes)
    inputs = stood(leaves, passed)
    got = log_linear_attention(**inputs, passed=passed, chunk=chunk)
    assert_same(leaves, got, log_linear_reference(**inputs, passed=passed))


@pytest.mark.parametrize("sizes", SIZES)
def test_recomputed_spans(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    passed = torch.full(sizes[:1], 6)
    leaves = make(*sizes)
    inputs = stood(leaves, passed)
    want = log_linear_attention(**inputs, passed=passed, chunk=4)
    monkeypatch.setattr(op, "SPAN", 12)
    assert_same(leaves, log_linear_attention(**inputs, passed=passed, chunk=4), want)


def spans(inputs: dict[str, Any], passed: Tensor, layout: Layout | None) -> tuple[chunks.Tokens, chunks.Span]:
    index = document_index(passed, inputs["v"].shape[1], layout)
    documents = None if layout is None or layout.resets is None else layout.resets.long().cumsum(1)
    return chunks.Tokens(*(inputs[name] for name in OVER_TIME)), chunks.Span(index, index + 1, documents, passed)


def test_plain_form() -> None:
    leaves = make(3, 24, 2, 4, 3, 2, 5)
    passed = torch.tensor([0, 5, 37])
    resets = torch.zeros(3, 24, dtype=torch.bool)
    resets[0, [0, 7, 8]] = resets[1, [20]] = True
    inputs = stood(leaves, passed)
    for layout in (None, Layout(resets=resets)):
        y, state = chunks.plain(*spans(inputs, passed, layout), inputs["state"], 3)
        assert_same(leaves, (y, state), log_linear_reference(**inputs, passed=passed, layout=layout)[:2])


def test_plain_form_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other devices, whose form is asked for here."""
    monkeypatch.setattr(op, "SPAN", 8)
    monkeypatch.setattr(op, "blocked", lambda part, span, state, n, keep: chunks.plain(part, span, state, n))
    leaves = make(2, 21, 1, 2, 3, 2, 4)
    passed = torch.tensor([3, 9])
    inputs = stood(leaves, passed)
    got = log_linear_attention(**inputs, passed=passed, chunk=4)
    assert_same(leaves, got, log_linear_reference(**inputs, passed=passed))


def test_doubling() -> None:
    r = torch.Generator().manual_seed(0)
    mix, put, state = (
        torch.randn(s, generator=r, dtype=torch.float64) for s in [(11, 2, 1, 3, 3), (11, 2, 1, 3, 4), (2, 1, 3, 4)]
    )
    torch.testing.assert_close(chunks._carry_by_doubling(mix, put, state, 4), chunks._carry(mix, put, state))


class Op(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor) -> Any:
        return log_linear_attention(q, k, v, g, weights, chunk=4)


@pytest.mark.slow
def test_exported_with_an_unknown_length() -> None:
    length = torch.export.Dim("length", max=1 << 20)
    inputs = [t.detach() for t in make(2, 21, 1, 2, 3, 2, 5, dtype=torch.float32).values()][:-1]
    program = torch.export.export(
        Op(),
        tuple(inputs),
        dynamic_shapes=[{1: length}] * 5,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,  # as `mmlong export`
    ).module()
    for n in (2, 5, 8, 21):
        cut = [t[:, :n] for t in inputs]
        torch.testing.assert_close(program(*cut), Op()(*cut))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lengths_and_resets(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    leaves = make(B, L, 1, 2, 3, 2, data.draw(st.integers(2, 5)))
    passed = torch.tensor(data.draw(st.lists(st.integers(0, 40), min_size=B, max_size=B)))
    some = st.lists(st.integers(0, L), min_size=B, max_size=B)
    lengths = torch.tensor(data.draw(some)) if data.draw(st.booleans()) else None
    flags = st.lists(st.booleans(), min_size=B * L, max_size=B * L)
    resets = torch.tensor(data.draw(flags)).view(B, L) if data.draw(st.booleans()) else None
    layout = Layout(lengths=lengths, resets=resets)
    inputs = stood(leaves, passed)
    valid = layout.valid(L)
    keep = torch.ones(B, L, dtype=torch.bool) if valid is None else valid

    def seen(result: Any) -> Any:
        return torch.where(keep[..., None, None], result[0], 0), *result[1:]

    size = data.draw(st.sampled_from([1, 3, 4, 8]))
    got = log_linear_attention(**inputs, passed=passed, layout=layout, chunk=size)
    want = log_linear_reference(**inputs, passed=passed, layout=layout)
    assert got[2].tolist() == counts_after(layout, L, passed).tolist()
    assert_same(leaves, seen(got), seen(want))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 9))
def test_pieces(pieces: list[int], begun: int) -> None:
    leaves = make(2, sum(pieces), 1, 2, 3, 2, 5)
    passed = torch.tensor([begun, begun])
    inputs = stood(leaves, passed)
    state, count, outputs, at = inputs["state"], passed, [], 0
    for n in pieces:
        part = {name: inputs[name][:, at : at + n] for name in OVER_TIME}
        y, state, count = log_linear_attention(**part, state=state, passed=count, chunk=4)
        outputs.append(y)
        at += n
    want = log_linear_attention(**inputs, passed=passed, chunk=4)
    assert_same(leaves, (torch.cat(outputs, 1), state, count), want)


def test_of_weights_one_it_is_linear_attention() -> None:
    """And the buckets sum to its state."""
    inputs = make(2, 70, 1, 2, 4, 3, 6)
    q, k, v, g = (inputs[name] for name in ("q", "k", "v", "g"))
    y, state, _ = log_linear_attention(q, k, v, g, torch.ones_like(inputs["weights"]), chunk=8)
    want, S = scalar_decay_attention(q, k, v, g)
    leaves = {name: inputs[name] for name in ("q", "k", "v", "g")}
    assert_same(leaves, (y, state.sum(2).mT), (want, S))


def test_beyond_its_levels_the_last_is_one_bucket() -> None:
    """Three levels tell apart the token, its neighbour and the rest; all else is in one place of the state."""
    inputs = make(1, 64, 1, 1, 2, 2, 3)
    del inputs["state"]
    q, k, v, g, w = inputs.values()
    y, state, _ = log_linear_attention(q, k, v, g, w, chunk=8)
    assert float(state[:, :, 0].detach().abs().max()) == 0
    _, S = scalar_decay_attention(q, k, v, g)
    torch.testing.assert_close(state[:, :, 1].mT, S)
    assert_same(inputs, [y], [all_pairs(inputs)])


def test_counts_of_millions() -> None:
    """A count just before a carry through 21 digits, with and without levels for it."""
    for K in (22, 23, 24):
        leaves = make(1, 9, 1, 1, 2, 2, K)
        passed = torch.tensor([(1 << 21) - 4])
        inputs = stood(leaves, passed)
        got = log_linear_attention(**inputs, passed=passed, chunk=4)
        assert_same(leaves, got, log_linear_reference(**inputs, passed=passed))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_against_fla(length: int, groups: int) -> None:
    """flash-linear-attention's masks over all pairs, which number levels alike; its decays, queries, keys, values and weights have gradients too."""
    naive = pytest.importorskip("fla.ops.log_linear_attn.naive")
    inputs = make(2, length, groups, 4, 8, 6, 9)
    del inputs["state"]
    want = naive.naive_log_linear_attn(*inputs.values())
    assert_same(inputs, [log_linear_attention(**inputs, chunk=16)[0]], [want])


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_any_decay_is_within_tolerance_of_float64(low: torch.dtype) -> None:
    """Decays from none to all within a chunk, keys at 1e3; the sum of ``g`` reaches -3,700 in a chunk, whose float32 spacing, 2e-4, is a weight's relative error."""
    inputs = {name: t.detach() for name, t in make(1, 130, 2, 4, 4, 4, 9, dtype=torch.float32).items()}
    passed = torch.tensor([511])
    inputs = stood(inputs, passed)
    inputs["k"] = 1e3 * inputs["k"]
    inputs["g"] = -torch.tensor([0.0, 1e-6, 20.0, 30.0, 200.0]).repeat(104).view(1, 130, 4)
    rounded = {name: t.to(low) if name in ("q", "k", "v") else t for name, t in inputs.items()}
    results = []
    for values, form in (
        ({name: t.double() for name, t in rounded.items()}, log_linear_reference),
        (rounded, log_linear_attention),
    ):
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        y, state, _ = form(**leaves, passed=passed)  # type: ignore[operator]
        dy = rounded["v"].to(y.dtype)
        results.append([y, state, *torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)])
    want, got = results
    assert (got[0].dtype, got[1].dtype) == (low, torch.float32)
    for name, a, b in zip(["y", "state", *inputs], got, want, strict=True):
        scale = float(b.detach().abs().max())
        allowed = 2e-3 if a.dtype == torch.float32 else 8e-3
        assert float((a.double() - b).detach().abs().max()) < allowed * scale, name


def test_gradcheck() -> None:
    inputs = make(2, 11, 1, 2, 3, 2, 4)
    del inputs["state"]
    names = list(inputs)
    call: Any = lambda *t: log_linear_attention(**dict(zip(names, t, strict=True)), chunk=4)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_autocast_leaves_the_op_alone() -> None:
    inputs = make(1, 70, 1, 2, 8, 8, 8, dtype=torch.float32)
    del inputs["state"]
    want = log_linear_attention(**inputs, chunk=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = log_linear_attention(**inputs, chunk=16)
        gradients = torch.autograd.grad(got[0].sum(), list(inputs.values()))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for m, t in zip(gradients, torch.autograd.grad(want[0].sum(), list(inputs.values())), strict=True):
        torch.testing.assert_close(m, t, rtol=0, atol=0)


def test_shapes_that_do_not_fit() -> None:
    inputs = make(2, 9, 1, 4, 3, 3, 4)
    passed = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be \\(B, L, G, N\\)"):
        log_linear_attention(**{**inputs, "k": inputs["k"][:, :5]}, passed=passed)
    with pytest.raises(ValueError, match="weights"):
        log_linear_attention(**{**inputs, "weights": inputs["weights"][..., :1]}, passed=passed)
    with pytest.raises(ValueError, match="state is"):
        log_linear_attention(**{**inputs, "state": inputs["state"][:1]}, passed=passed)
    with pytest.raises(ValueError, match="go together"):
        log_linear_attention(**inputs)
