"""Linear attention with a decay a channel: blocked, traced and doubling forms against the recurrence, other people's code, and itself in pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import chunk_forms as forms
from mmlong.ops.gated_linear_attention import _GatedChunks, gated_linear_attention, gated_linear_attention_reference

OVER_TIME = ("q", "k", "v", "g")


def make(
    B: int, L: int, H: int, N: int, P: int, bonus: bool = False, dtype: torch.dtype = torch.float64, grad: bool = True
) -> dict[str, Tensor]:
    r = torch.Generator().manual_seed(100 * B + L + H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, dtype=dtype)

    inputs = {
        "q": normal(B, L, H, N),
        "k": normal(B, L, H, N) / math.sqrt(N),
        "v": normal(B, L, H, P),
        "g": -F.softplus(normal(B, L, H, N)),
        "state": normal(B, H, N, P),
    }
    if bonus:
        inputs["bonus"] = normal(H, N)
    return {name: t.requires_grad_(grad) for name, t in inputs.items()}


def assert_same(
    inputs: dict[str, Tensor], got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], **tolerance: float
) -> None:
    torch.testing.assert_close(got, want, **tolerance)
    r = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(t.shape, generator=r, dtype=t.dtype) for t in want]
    mine = torch.autograd.grad(got, list(inputs.values()), cotangents, retain_graph=True)
    theirs = torch.autograd.grad(want, list(inputs.values()), cotangents, retain_graph=True)
    for name, m, t in zip(inputs, mine, theirs, strict=True):
        torch.testing.assert_close(m, t, msg=lambda text, name=name: f"gradient of {name}: {text}", **tolerance)


def over_time(inputs: dict[str, Tensor]) -> forms.Given:
    return tuple(inputs[name] for name in ("q", "k", "g", "v"))


SIZES = [(1, 257, 1, 5, 3), (3, 63, 2, 4, 6), (1, 16, 3, 3, 2), (3, 1, 1, 4, 4), (2, 20, 2, 1, 3)]


@pytest.mark.parametrize("bonus", [False, True], ids=["after the token", "bonus"])
@pytest.mark.parametrize(("chunk", "block"), [(None, 1 << 18), (8, 1), (1, 1 << 18)])
@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_equal_recurrence(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], chunk: int | None, block: int, bonus: bool
) -> None:
    monkeypatch.setattr(forms, "BLOCK_ELEMENTS", block)
    inputs = make(*sizes, bonus=bonus)
    got = gated_linear_attention(**inputs, chunk=chunk)
    assert "Blocked" in got[1].grad_fn.name()
    assert_same(inputs, got, gated_linear_attention_reference(**inputs))


@pytest.mark.parametrize("bonus", [False, True], ids=["after the token", "bonus"])
def test_from_the_beginning_and_kept(bonus: bool) -> None:
    inputs = make(2, 75, 2, 5, 3, bonus=bonus)
    del inputs["state"]
    kept = gated_linear_attention(**inputs, chunk=8, keep=True)
    want = gated_linear_attention_reference(**inputs)
    assert_same(inputs, kept, want)
    assert_same(inputs, kept, want)  # what was kept is used up, and made anew


@pytest.mark.parametrize("sizes", SIZES)
def test_traced_form(sizes: tuple[int, ...]) -> None:
    inputs = make(*sizes)
    got = forms.plain(_GatedChunks, over_time(inputs), inputs["state"], None, 8)
    assert_same(inputs, got, gated_linear_attention_reference(**inputs))


def test_form_for_an_unknown_number_of_chunks() -> None:
    inputs = make(2, 77, 2, 5, 3)
    documents = torch.zeros(2, 77, dtype=torch.long)
    documents[0, 30:], documents[1, 40:] = 1, 2
    block = forms.Block(slice(0, 2), 0, 77, 11, 8)
    chunks = block.chunks(_GatedChunks, over_time(inputs), documents, torch.float64)
    y, state = chunks.run_by_doubling(inputs["state"].flatten(0, 1), 4)
    want, _, last = chunks.run(inputs["state"].flatten(0, 1))
    assert_same(inputs, (y, state), (want, last))


def test_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "STRETCH_CHUNKS", 2)
    inputs = make(2, 53, 2, 3, 2)
    resets = torch.zeros(2, 53, dtype=torch.bool)
    resets[0, [0, 16, 20]] = resets[1, [31]] = True
    got = forms.stretches(_GatedChunks, over_time(inputs), inputs["state"], resets.long().cumsum(1), 8)
    assert_same(inputs, got, gated_linear_attention_reference(**inputs, layout=Layout(resets=resets)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lengths_and_resets(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    inputs = make(B, L, 2, 3, 2, bonus=data.draw(st.booleans()))
    some = st.lists(st.integers(0, L), min_size=B, max_size=B)
    lengths = torch.tensor(data.draw(some)) if data.draw(st.booleans()) else None
    flags = st.lists(st.booleans(), min_size=B * L, max_size=B * L)
    resets = torch.tensor(data.draw(flags)).view(B, L) if data.draw(st.booleans()) else None
    layout = Layout(lengths=lengths, resets=resets)
    want = gated_linear_attention_reference(**inputs, layout=layout)
    valid = layout.valid(L)
    keep = torch.ones(B, L, dtype=torch.bool) if valid is None else valid

    def seen(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.where(keep[..., None, None], result[0], 0), result[1]

    got = gated_linear_attention(**inputs, layout=layout, chunk=data.draw(st.sampled_from([1, 2, 4, 8])))
    assert_same(inputs, seen(got), seen(want))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_pieces(pieces: list[int], bonus: bool) -> None:
    inputs = make(2, sum(pieces), 2, 3, 2, bonus=bonus)
    fixed = {name: inputs[name] for name in inputs if name == "bonus"}
    state, outputs, at = inputs["state"], [], 0
    for n in pieces:
        part = {name: inputs[name][:, at : at + n] for name in OVER_TIME}
        y, state = gated_linear_attention(**part, **fixed, state=state, chunk=4)
        outputs.append(y)
        at += n
    assert_same(inputs, (torch.cat(outputs, 1), state), gated_linear_attention(**inputs, chunk=4))


@pytest.mark.parametrize("bonus", [False, True])
def test_one_token_without_grad(bonus: bool) -> None:
    inputs = make(3, 7, 4, 5, 3, bonus=bonus, grad=False)
    want = gated_linear_attention_reference(**inputs)
    fixed = {name: inputs[name] for name in inputs if name == "bonus"}
    state, outputs = inputs["state"], []
    for t in range(7):
        part = {name: inputs[name][:, t : t + 1] for name in OVER_TIME}
        with torch.no_grad():
            y, state = gated_linear_attention(**part, **fixed, state=state)
        outputs.append(y)
    torch.testing.assert_close((torch.cat(outputs, 1), state), want)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_any_decay_is_within_tolerance_of_float64(low: torch.dtype) -> None:
    """Decays from none to all within a chunk, keys at 1e3: exponents of either sign would overflow in factored form.

    The sum of ``g`` reaches -3,700 in a chunk, whose float32 spacing, 2e-4, is the relative error of a weight.
    """
    inputs = make(1, 130, 2, 4, 4, dtype=torch.float32, grad=False)
    inputs["k"] = 1e3 * inputs["k"]
    inputs["g"] = -torch.tensor([0.0, 1e-6, 20.0, 30.0, 200.0]).repeat(208).view(1, 130, 2, 4)
    rounded = {name: t.to(low) if name in ("q", "k", "v") else t for name, t in inputs.items()}
    results = []
    for values, form in (
        ({name: t.double() for name, t in rounded.items()}, gated_linear_attention_reference),
        (rounded, gated_linear_attention),
    ):
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        y, state = form(**leaves)  # type: ignore[operator]
        dy = inputs["v"].to(y.dtype)
        results.append([y, state, *torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)])
    want, got = results
    assert (got[0].dtype, got[1].dtype) == (low, torch.float32)
    for name, a, b in zip(["y", "state", *inputs], got, want, strict=True):
        scale = float(b.detach().abs().max())
        allowed = 2e-3 if a.dtype == torch.float32 else 8e-3
        assert float((a.double() - b).detach().abs().max()) < allowed * scale, name


def test_gradcheck() -> None:
    inputs = make(2, 11, 2, 3, 2, bonus=True)
    names = list(inputs)
    call: Any = lambda *t: gated_linear_attention(**dict(zip(names, t, strict=True)), chunk=4)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_autocast_leaves_the_recurrence_alone() -> None:
    inputs = make(1, 70, 2, 8, 8, dtype=torch.float32)
    want = gated_linear_attention(**inputs, chunk=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gated_linear_attention(**inputs, chunk=16)
        gradients = torch.autograd.grad(got[0].sum(), list(inputs.values()))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for m, t in zip(gradients, torch.autograd.grad(want[0].sum(), list(inputs.values())), strict=True):
        torch.testing.assert_close(m, t, rtol=0, atol=0)


def test_against_fla_gla() -> None:
    naive = pytest.importorskip("fla.ops.gla.naive")
    inputs = make(2, 130, 3, 8, 6, dtype=torch.float32)
    q, k, v, g, state = inputs.values()
    got = gated_linear_attention(q * 8**-0.5, k, v, g, state=state, chunk=16)
    want = naive.naive_recurrent_gla(q, k, v, g, state, True)
    assert_same(inputs, got, want, rtol=1e-4, atol=1e-4)


def test_against_fla_rwkv6() -> None:
    naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive")
    inputs = make(2, 130, 3, 8, 6, bonus=True, dtype=torch.float32)
    q, k, v, g, state, bonus = inputs.values()
    got = gated_linear_attention(q, k, v, g, bonus, state, chunk=16)
    heads = [t.transpose(1, 2) for t in (q, k, v, g)]
    y, last = naive.naive_recurrent_rwkv6(*heads, bonus, scale=1.0, initial_state=state, output_final_state=True)
    assert_same(inputs, got, (y.transpose(1, 2), last), rtol=1e-4, atol=1e-4)


def test_shapes_that_do_not_fit() -> None:
    inputs = make(2, 9, 4, 3, 3)
    with pytest.raises(ValueError, match="g is"):
        gated_linear_attention(**{**inputs, "g": inputs["g"][..., 0]})
    with pytest.raises(ValueError, match="state is"):
        gated_linear_attention(**{**inputs, "state": inputs["state"][:1]})
    with pytest.raises(ValueError, match="bonus is"):
        gated_linear_attention(**inputs, bonus=inputs["state"])
    with pytest.raises(ValueError, match="power of two"):
        gated_linear_attention(**inputs, chunk=3)
