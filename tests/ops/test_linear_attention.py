"""Scalar-decay linear attention: blocked and traced forms against the recurrence, other people's code, and itself in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import linear_attention_blocks as module
from mmlong.ops.linear_attention import scalar_decay_attention, scalar_decay_reference
from mmlong.ops.linear_attention_whole import whole

NAMES = ("q", "k", "v", "g", "log_input", "skip", "state")


def make(
    B: int, L: int, H: int, G: int, N: int, P: int, dtype: torch.dtype = torch.float64, grad: bool = True
) -> dict[str, Tensor]:
    r = torch.Generator().manual_seed(100 * B + L + H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, dtype=dtype)

    inputs = {
        "q": normal(B, L, G, N),
        "k": normal(B, L, G, N) / math.sqrt(N),
        "v": normal(B, L, H, P),
        "g": -torch.nn.functional.softplus(normal(B, L, H)),
        "log_input": normal(B, L, H),
        "skip": normal(H),
        "state": normal(B, H, P, N),
    }
    return {name: t.requires_grad_(grad) for name, t in inputs.items()}


def assert_same(inputs: dict[str, Tensor], got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got, want)
    r = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(t.shape, generator=r, dtype=t.dtype) for t in want]
    mine = torch.autograd.grad(got, list(inputs.values()), cotangents, retain_graph=True)
    theirs = torch.autograd.grad(want, list(inputs.values()), cotangents, retain_graph=True)
    for name, m, t in zip(inputs, mine, theirs, strict=True):
        torch.testing.assert_close(m, t, msg=lambda text, name=name: f"gradient of {name}: {text}")


SIZES = [(1, 129, 2, 1, 5, 3), (3, 63, 4, 2, 4, 6), (2, 40, 3, 3, 4, 2), (3, 1, 1, 1, 4, 4), (1, 16, 8, 1, 3, 2)]


@pytest.mark.parametrize("looped", [1, 1 << 12], ids=["looped", "product"])
@pytest.mark.parametrize("block", [1 << 18, 1], ids=["large blocks", "a chunk a block"])
@pytest.mark.parametrize("chunk", [None, 8, 1])
@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_equal_recurrence(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], chunk: int | None, block: int, looped: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(module, "LOOPED_ELEMENTS", looped)
    inputs = make(*sizes)
    got = scalar_decay_attention(**inputs, chunk=chunk)
    assert "ScalarDecay" in got[0].grad_fn.name()
    assert_same(inputs, got, scalar_decay_reference(**inputs))


def test_kept_weights_change_nothing() -> None:
    inputs = make(2, 75, 4, 2, 5, 3)
    kept = scalar_decay_attention(**inputs, chunk=8, keep=True)
    cotangents = [torch.ones_like(t) for t in kept]
    want = scalar_decay_attention(**inputs, chunk=8)
    mine, theirs = (torch.autograd.grad(t, list(inputs.values()), cotangents, retain_graph=True) for t in (kept, want))
    torch.testing.assert_close([*kept, *mine], [*want, *theirs], rtol=0, atol=0)
    # They are used up by the first backward; a second one over the same graph makes them anew.
    torch.testing.assert_close(torch.autograd.grad(kept, list(inputs.values()), cotangents), mine, rtol=0, atol=0)


@pytest.mark.parametrize("absent", [{"log_input"}, {"skip"}, {"state"}, {"log_input", "skip", "state"}])
def test_optional_inputs(absent: set[str]) -> None:
    inputs = {name: t for name, t in make(2, 35, 2, 1, 4, 3).items() if name not in absent}
    assert_same(inputs, scalar_decay_attention(**inputs, chunk=8), scalar_decay_reference(**inputs))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_lengths_and_resets(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    inputs = make(B, L, 2, 1, 3, 2)
    some = st.lists(st.integers(0, L), min_size=B, max_size=B)
    lengths = torch.tensor(data.draw(some)) if data.draw(st.booleans()) else None
    flags = st.lists(st.booleans(), min_size=B * L, max_size=B * L)
    resets = torch.tensor(data.draw(flags)).view(B, L) if data.draw(st.booleans()) else None
    layout = Layout(lengths=lengths, resets=resets)
    want = scalar_decay_reference(**inputs, layout=layout)
    chunk = data.draw(st.integers(1, 6))
    looped = data.draw(st.sampled_from([1, 1 << 12]))
    valid = layout.valid(L)
    keep = torch.ones(B, L, dtype=torch.bool) if valid is None else valid

    def seen(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.where(keep[..., None, None], result[0], 0), result[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOOPED_ELEMENTS", looped)
        assert_same(inputs, seen(scalar_decay_attention(**inputs, layout=layout, chunk=chunk)), seen(want))
    documents = layout.documents()
    if lengths is None:
        tensors = [inputs[name] for name in NAMES]
        assert_same(inputs, whole(*tensors, documents, chunk), want)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 5))
def test_pieces(pieces: list[int], chunk: int) -> None:
    L = sum(pieces)
    inputs = make(2, L, 2, 1, 3, 2)
    state = inputs["state"]
    outputs, at = [], 0
    for n in pieces:
        part = {name: inputs[name][:, at : at + n] for name in NAMES[:5]}
        y, state = scalar_decay_attention(**part, skip=inputs["skip"], state=state, chunk=chunk)
        outputs.append(y)
        at += n
    assert_same(inputs, (torch.cat(outputs, 1), state), scalar_decay_attention(**inputs, chunk=chunk))


def test_one_token_without_grad() -> None:
    inputs = make(3, 7, 4, 2, 5, 3, grad=False)
    want = scalar_decay_reference(**inputs)
    state, outputs = inputs["state"], []
    with torch.no_grad():
        for t in range(7):
            part = {name: inputs[name][:, t : t + 1] for name in NAMES[:5]}
            y, state = scalar_decay_attention(**part, skip=inputs["skip"], state=state)
            outputs.append(y)
    torch.testing.assert_close((torch.cat(outputs, 1), state), want)


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_traced_form(sizes: tuple[int, ...], optional: bool) -> None:
    inputs = make(*sizes)
    if not optional:
        inputs = {name: t for name, t in inputs.items() if name not in ("log_input", "skip")}
    tensors = [inputs.get(name) for name in NAMES]
    assert_same(inputs, whole(*tensors, None, 8), scalar_decay_reference(**inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["blocks", "plain"])
def test_any_decay_is_finite(form: str) -> None:
    """Decays from none to all within a chunk: exponents of either sign would overflow in factored form.

    The sum of ``g`` reaches -1,300 in a chunk, whose float32 spacing, 1e-4, is the relative error of a weight.
    """
    inputs = make(1, 130, 2, 1, 4, 4, torch.float32)
    g = -torch.tensor([0.0, 1e-6, 30.0, 200.0]).repeat(66)[: 130 * 2].view(1, 130, 2)
    inputs["g"] = g.requires_grad_()
    tensors = [inputs[name] for name in NAMES]
    got = scalar_decay_attention(**inputs, chunk=64) if form == "blocks" else whole(*tensors, None, 64)
    want = scalar_decay_reference(**{name: t.detach().double() for name, t in inputs.items()})
    torch.testing.assert_close(got[0].double(), want[0], rtol=5e-4, atol=5e-4)
    for gradient in torch.autograd.grad(got[0].square().sum(), list(inputs.values())):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("form", ["blocks", "plain"])
def test_weak_decays_after_strong_ones(form: str) -> None:
    """Within a block of chunks the log decays come to -24,000, where float32 counts in steps of 2e-3; what is remembered afterwards hangs on thousandths."""
    inputs = make(1, 1024, 1, 1, 4, 4, torch.float32, grad=False)
    g = torch.full((1, 1024, 1), -1e-3)
    g[:, :480] = -50.0
    inputs["g"] = g
    tensors = [inputs[name] for name in NAMES]
    got = scalar_decay_attention(**inputs, chunk=32) if form == "blocks" else whole(*tensors, None, 32)
    want = scalar_decay_reference(**{name: t.double() for name, t in inputs.items()})
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-5


def test_nothing_written_at_minus_infinity() -> None:
    inputs = make(1, 20, 1, 1, 3, 3)
    silent = inputs["log_input"].detach().clone()
    silent[:, 4:9] = -math.inf
    y, state = scalar_decay_attention(**{**inputs, "log_input": silent.requires_grad_()}, chunk=8)
    grads = torch.autograd.grad(y.sum() + state.sum(), [silent, inputs["v"], inputs["g"]])
    assert all(torch.isfinite(t).all() for t in grads)
    assert grads[0][:, 4:9].abs().max() < 1e-12


def test_gradcheck() -> None:
    inputs = make(2, 11, 2, 1, 3, 2)
    assert torch.autograd.gradcheck(lambda *t: scalar_decay_attention(*t, chunk=4), tuple(inputs.values()))


def test_low_precision_gradient_of_the_decay() -> None:
    """With a large skip, the decay's gradient is a small difference: it must not be taken between rounded outputs."""
    inputs = make(1, 96, 2, 1, 8, 8, torch.float32, grad=False)
    inputs["skip"] = torch.full((2,), 30.0)
    exact = {name: t.bfloat16().double() if name in ("q", "k", "v") else t.double() for name, t in inputs.items()}
    half = {name: t.bfloat16() if name in ("q", "k", "v") else t for name, t in inputs.items()}
    dy = torch.randn(1, 96, 2, 8).bfloat16()
    gradients = []
    for values, form in ((exact, scalar_decay_reference), (half, scalar_decay_attention)):
        g = values["g"].requires_grad_()
        y, state = form(**{**values, "g": g})  # type: ignore[operator]
        gradients.append(torch.autograd.grad(y, g, dy.to(y.dtype))[0])
    assert state.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-3, atol=1e-3)


def test_autocast_leaves_the_recurrence_alone() -> None:
    inputs = make(1, 70, 2, 1, 8, 8, torch.float32)
    want = scalar_decay_attention(**inputs, chunk=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scalar_decay_attention(**inputs, chunk=16)
        gradients = torch.autograd.grad(got[0].sum(), list(inputs.values()), allow_unused=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for m, t in zip(gradients, torch.autograd.grad(want[0].sum(), list(inputs.values())), strict=True):
        torch.testing.assert_close(m, t, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_fla(dtype: torch.dtype) -> None:
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    inputs = make(2, 128, 3, 3, 8, 8, dtype)
    q, k, v, g, state = (inputs[name] for name in ("q", "k", "v", "g", "state"))
    y, last = scalar_decay_attention(q, k, v, g, state=state, chunk=16)
    want, want_last = naive.naive_recurrent_simple_gla(
        q.float(), k.float(), v.float(), g.float(), scale=1.0, initial_state=state.mT.float(), output_final_state=True
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, want.to(dtype), **tolerance)
    torch.testing.assert_close(last.mT, want_last.to(dtype), **tolerance)
    weights = torch.randn(y.shape)
    mine = torch.autograd.grad((y * weights).sum(), [q, k, v, g])
    theirs = torch.autograd.grad((want * weights).sum(), [q, k, v, g])
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, rtol=1e-3, atol=1e-3)


def test_shapes_that_do_not_fit() -> None:
    inputs = make(2, 9, 4, 2, 3, 3)
    with pytest.raises(ValueError, match="G dividing"):
        scalar_decay_attention(**{**inputs, "v": inputs["v"][:, :, :3]})
    with pytest.raises(ValueError, match="log_input is"):
        scalar_decay_attention(**{**inputs, "log_input": inputs["log_input"][:, :4]})
    with pytest.raises(ValueError, match="state is"):
        scalar_decay_attention(**{**inputs, "state": inputs["state"][:1]})
