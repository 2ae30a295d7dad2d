"""The delta rule: blocked, traced and doubling forms against the recurrence, other people's code, and itself in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import chunk_forms as module
from mmlong.ops.delta_chunks import Decayed, DecayedTwoKeys, DeltaChunks, TwoKeys
from mmlong.ops.delta_rule import delta_product, delta_rule, delta_rule_reference

Kind = str
KINDS = ("none", "head", "channel")


def make(
    B: int,
    L: int,
    H: int,
    N: int,
    P: int,
    kind: Kind = "head",
    erase: bool = False,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> dict[str, Tensor]:
    r = torch.Generator().manual_seed(100 * B + L + H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, dtype=dtype)

    inputs = {
        "q": normal(B, L, H, N),
        "k": F.normalize(normal(B, L, H, N), dim=-1),
        "v": normal(B, L, H, P),
        "beta": 2 * torch.sigmoid(normal(B, L, H)),  # negative eigenvalues too
        "state": normal(B, H, N, P),
    }
    if kind != "none":
        inputs["g"] = -F.softplus(normal(B, L, H, *([N] if kind == "channel" else [])))
    if erase:
        inputs["erase"] = inputs["k"] + 0.3 * F.normalize(normal(B, L, H, N), dim=-1)
        inputs["beta"] = inputs["beta"] / 2
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


def parts(inputs: dict[str, Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
    """What happens in chunks, and the inputs as it takes them."""
    kinds = (DeltaChunks, TwoKeys, Decayed, DecayedTwoKeys)
    kind = next(k for k in kinds if set(k.names) == set(inputs) - {"state"})
    given = [inputs[name] for name in kind.names]
    return kind, tuple(t[..., None] if t.ndim == 3 else t for t in given)


def plain(inputs: dict[str, Tensor], size: int, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return module.plain(*parts(inputs), inputs["state"], documents, size)


SIZES = [(1, 257, 1, 5, 3), (3, 63, 2, 4, 6), (1, 16, 3, 3, 2), (3, 1, 1, 4, 4)]


@pytest.mark.parametrize("erase", [False, True], ids=["one key", "two keys"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "block"), [(None, 1 << 18), (8, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_equal_recurrence(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], chunk: int | None, block: int, kind: Kind, erase: bool
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    inputs = make(*sizes, kind=kind, erase=erase)
    got = delta_rule(**inputs, chunk=chunk)
    assert "Blocked" in got[0].grad_fn.name()
    assert_same(inputs, got, delta_rule_reference(**inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_beginning_and_kept(kind: Kind) -> None:
    inputs = make(2, 75, 2, 5, 3, kind=kind)
    del inputs["state"]
    kept = delta_rule(**inputs, chunk=8, keep=True)
    want = delta_rule_reference(**inputs)
    assert_same(inputs, kept, want)
    assert_same(inputs, kept, want)  # what was kept is used up, and made anew


@pytest.mark.parametrize("erase", [False, True], ids=["one key", "two keys"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_traced_form(sizes: tuple[int, ...], kind: Kind, erase: bool) -> None:
    inputs = make(*sizes, kind=kind, erase=erase)
    assert_same(inputs, plain(inputs, 8), delta_rule_reference(**inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_form_for_an_unknown_number_of_chunks(kind: Kind) -> None:
    inputs = make(2, 77, 2, 5, 3, kind=kind)
    documents = torch.zeros(2, 77, dtype=torch.long)
    documents[0, 30:], documents[1, 40:] = 1, 2
    kind, given_ = parts(inputs)
    chunks = module.Block(slice(0, 2), 0, 77, 11, 8).chunks(kind, given_, documents, torch.float64)
    y, state = chunks.run_by_doubling(inputs["state"].flatten(0, 1), 4)
    want, _, last = chunks.run(inputs["state"].flatten(0, 1))
    assert_same(inputs, (y, state), (want, last))


@pytest.mark.parametrize("kind", KINDS)
def test_stretches(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    monkeypatch.setattr(module, "STRETCH_CHUNKS", 2)
    inputs = make(2, 53, 2, 3, 2, kind=kind)
    resets = torch.zeros(2, 53, dtype=torch.bool)
    resets[0, [0, 16, 20]] = resets[1, [31]] = True
    got = module.stretches(*parts(inputs), inputs["state"], resets.long().cumsum(1), 8)
    assert_same(inputs, got, delta_rule_reference(**inputs, layout=Layout(resets=resets)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lengths_and_resets(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    kind, erase = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    inputs = make(B, L, 2, 3, 2, kind=kind, erase=erase)
    some = st.lists(st.integers(0, L), min_size=B, max_size=B)
    lengths = torch.tensor(data.draw(some)) if data.draw(st.booleans()) else None
    flags = st.lists(st.booleans(), min_size=B * L, max_size=B * L)
    resets = torch.tensor(data.draw(flags)).view(B, L) if data.draw(st.booleans()) else None
    layout = Layout(lengths=lengths, resets=resets)
    want = delta_rule_reference(**inputs, layout=layout)
    chunk = data.draw(st.sampled_from([1, 2, 4, 8]))
    valid = layout.valid(L)
    keep = torch.ones(B, L, dtype=torch.bool) if valid is None else valid

    def seen(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.where(keep[..., None, None], result[0], 0), result[1]

    assert_same(inputs, seen(delta_rule(**inputs, layout=layout, chunk=chunk)), seen(want))
    if lengths is None:
        assert_same(inputs, plain(inputs, chunk, layout.documents()), want)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([1, 2, 4]), st.sampled_from(KINDS))
def test_pieces(pieces: list[int], chunk: int, kind: Kind) -> None:
    L = sum(pieces)
    inputs = make(2, L, 2, 3, 2, kind=kind)
    state, outputs, at = inputs["state"], [], 0
    for n in pieces:
        part = {name: t[:, at : at + n] for name, t in inputs.items() if name != "state"}
        y, state = delta_rule(**part, state=state, chunk=chunk)
        outputs.append(y)
        at += n
    assert_same(inputs, (torch.cat(outputs, 1), state), delta_rule(**inputs, chunk=chunk))


@pytest.mark.parametrize("erase", [False, True], ids=["one key", "two keys"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_without_grad(kind: Kind, erase: bool) -> None:
    inputs = make(3, 7, 4, 5, 3, kind=kind, erase=erase, grad=False)
    state, outputs = inputs["state"], []
    with torch.no_grad():
        for t in range(7):
            part = {name: u[:, t : t + 1] for name, u in inputs.items() if name != "state"}
            y, state = delta_rule(**part, state=state)
            outputs.append(y)
    torch.testing.assert_close((torch.cat(outputs, 1), state), delta_rule_reference(**inputs))


def several(B: int, L: int, n: int, kind: Kind) -> dict[str, Tensor]:
    """Inputs of :func:`delta_product` with ``n`` steps a token."""
    inputs = make(B, L * n, 2, 3, 2, kind=kind, grad=False)
    inputs["q"] = inputs["q"][:, ::n]
    if kind != "none":
        inputs["g"] = inputs["g"][:, ::n]
    steps = {name: inputs[name].unflatten(1, (L, n)) for name in ("k", "v", "beta")}
    return {name: t.clone().requires_grad_() for name, t in {**inputs, **steps}.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_several_steps_a_token(n: int, kind: Kind) -> None:
    """Against a product of Householder matrices for each token, written out."""
    B, L, H, N = 2, 19, 2, 3
    inputs = several(B, L, n, kind)
    resets = torch.zeros(B, L, dtype=torch.bool)
    resets[0, [0, 7]] = resets[1, 12] = True
    S, outputs, eye = inputs["state"], [], torch.eye(N, dtype=torch.float64)
    for t in range(L):
        S = torch.where(resets[:, t, None, None, None], 0, S)
        if kind != "none":
            S = inputs["g"][:, t].exp().reshape(B, H, -1, 1) * S
        for j in range(n):
            k, v, beta = (inputs[name][:, t, j] for name in ("k", "v", "beta"))
            outer = beta[..., None, None] * k[..., :, None]
            S = (eye - outer * k[..., None, :]) @ S + outer * v[..., None, :]
        outputs.append((inputs["q"][:, t, :, None] @ S)[..., 0, :])
    got = delta_product(**inputs, layout=Layout(resets=resets), chunk=8)
    assert_same(inputs, got, (torch.stack(outputs, 1), S))


def test_several_steps_in_padded_rows() -> None:
    inputs = several(2, 9, 2, "head")
    lengths = torch.tensor([9, 4])
    y, state = delta_product(**inputs, layout=Layout(lengths=lengths), chunk=4)
    for row, length in enumerate(lengths.tolist()):
        own = {name: t[row : row + 1] if name == "state" else t[row : row + 1, :length] for name, t in inputs.items()}
        want, last = delta_product(**own, chunk=4)
        torch.testing.assert_close((y[row : row + 1, :length], state[row : row + 1]), (want, last))


def test_transition_of_diagonal_plus_rank_one() -> None:
    """``S (D - a f^T)`` with a separate write is two steps, as the docstring says; ``f`` reads the state before it decays."""
    B, L, H, N, P = 2, 21, 2, 4, 3
    inputs = make(B, L, H, N, P, kind="channel")
    a, f = (F.normalize(torch.randn(B, L, H, N, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    S, outputs = inputs["state"], []
    for t in range(L):
        k, v, D = inputs["k"][:, t], inputs["v"][:, t], inputs["g"][:, t].exp()
        read = f[:, t, :, None] @ S
        S = D[..., None] * S - a[:, t, :, :, None] @ read + k[..., None] @ v[..., None, :]
        outputs.append((inputs["q"][:, t, :, None] @ S)[..., 0, :])
    got = delta_product(
        inputs["q"],
        torch.stack([a, inputs["k"]], 2),
        torch.stack([torch.zeros_like(inputs["v"]), inputs["v"]], 2),
        torch.ones(B, L, 2, H, dtype=torch.float64),
        inputs["g"],
        torch.stack([f * (-inputs["g"]).exp(), torch.zeros_like(f)], 2),
        inputs["state"],
        chunk=8,
    )
    leaves = {name: t for name, t in inputs.items() if name != "beta"} | {"a": a, "f": f}
    assert_same(leaves, got, (torch.stack(outputs, 1), S))


@pytest.mark.parametrize("form", ["blocks", "plain"])
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_any_decay_is_finite(form: str, kind: Kind) -> None:
    """Decays from none to all within a chunk: exponents of either sign would overflow in factored form.

    The sum of ``g`` reaches -3,700 in a chunk, whose float32 spacing, 2e-4, is the relative error of a weight.
    """
    inputs = make(1, 130, 2, 4, 4, kind=kind, dtype=torch.float32)
    g = -torch.tensor([0.0, 1e-6, 30.0, 200.0]).repeat(4 * 66)[: inputs["g"].numel()].view(inputs["g"].shape)
    inputs["g"] = g.requires_grad_()
    got = delta_rule(**inputs, chunk=64) if form == "blocks" else plain(inputs, 64)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    want = delta_rule_reference(**wide)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-3, atol=2e-3)
    found = torch.autograd.grad(got[0].square().sum(), list(inputs.values()))
    expected = torch.autograd.grad(want[0].square().sum(), list(wide.values()))
    for name, a, b in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-2, atol=1e-2 * float(b.abs().max()) + 1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_long_strong_decay_and_equal_keys_in_float32() -> None:
    """One key all along with beta 2 (a reflection each token), and decays to e^-20 a step: finite, and as in float64."""
    L = 2049
    k = F.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, L, 1, 8)
    for beta, rate in ((2.0, 0.0), (1.0, 0.0), (0.01, 1e-4), (1.9, 20.0)):
        given_ = {"q": k, "k": k, "v": torch.randn(1, L, 1, 4), "beta": torch.full((1, L, 1), beta)}
        given_["g"] = torch.full((1, L, 1, 8), -rate)
        want, _ = delta_rule_reference(**{name: t.double() for name, t in given_.items()})
        got, _ = delta_rule(**given_)
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Kind) -> None:
    inputs = make(2, 11, 2, 3, 2, kind=kind, erase=True)
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *t: delta_rule(**dict(zip(names, t, strict=True)), chunk=4), tuple(inputs.values())
    )


def test_gradients_of_some_inputs_and_one_output() -> None:
    inputs = make(2, 37, 2, 3, 2)
    want = delta_rule_reference(**inputs)
    for name in inputs:
        only = {n: t if n == name else t.detach() for n, t in inputs.items()}
        for which in (0, 1):
            got = torch.autograd.grad(delta_rule(**only, chunk=8)[which].sin().sum(), inputs[name], allow_unused=True)[
                0
            ]
            expected = torch.autograd.grad(want[which].sin().sum(), inputs[name], retain_graph=True, allow_unused=True)[
                0
            ]
            torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


def test_autocast_and_low_precision() -> None:
    inputs = make(1, 70, 2, 8, 8, kind="channel", dtype=torch.float32)
    want = delta_rule(**inputs, chunk=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = delta_rule(**inputs, chunk=16)
        gradients = torch.autograd.grad(got[0].sum(), list(inputs.values()), allow_unused=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for m, t in zip(gradients, torch.autograd.grad(want[0].sum(), list(inputs.values())), strict=True):
        torch.testing.assert_close(m, t, rtol=0, atol=0)
    half = {name: t.detach().bfloat16() if name in "qkv" else t.detach() for name, t in inputs.items()}
    half = {name: t.requires_grad_() for name, t in half.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in half.items()}
    y, state = delta_rule(**half, chunk=16)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    want_y, _ = delta_rule_reference(**exact)
    torch.testing.assert_close(y.double(), want_y, rtol=1e-2, atol=1e-2)
    dy = torch.randn(y.shape).bfloat16()
    mine = torch.autograd.grad(y, [half["g"], half["beta"]], dy)
    theirs = torch.autograd.grad(want_y, [exact["g"], exact["beta"]], dy.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def fla(kind: Kind, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    """Outputs and final state of flash-linear-attention's definitions; they scale queries by ``N ** -0.5``."""
    q, k, v, beta, g, state = (inputs.get(name) for name in ("q", "k", "v", "beta", "g", "state"))
    turned = [t.transpose(1, 2) for t in (q, k, v, beta) if t is not None]
    if kind == "none":
        naive = pytest.importorskip("fla.ops.delta_rule.naive")
        y, last = naive.delta_rule_recurrence(*turned, initial_state=state, output_final_state=True)
        return y.transpose(1, 2), last
    if kind == "head":
        naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
        return naive.naive_recurrent_gated_delta_rule(
            q, k, v, beta, g, scale=q.shape[-1] ** -0.5, initial_state=state, output_final_state=True
        )
    naive = pytest.importorskip("fla.ops.kda.naive")
    return naive.naive_recurrent_kda(q, k, v, g, beta, initial_state=state, output_final_state=True)


@pytest.mark.parametrize("kind", KINDS)
def test_against_fla(kind: Kind) -> None:
    inputs = make(2, 63, 3, 8, 8, kind=kind, dtype=torch.float32)
    want = fla(kind, inputs)
    got = delta_rule(**{**inputs, "q": inputs["q"] * 8**-0.5}, chunk=16)
    assert_same(inputs, got, want, rtol=1e-4, atol=1e-4)


def test_dplr_against_fla() -> None:
    """Their ``S <- S Diag(exp(g)) + (S^T a) b + k v``, by two steps."""
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    inputs = make(2, 32, 2, 8, 8, kind="channel", dtype=torch.float32)
    a = F.normalize(torch.randn(2, 32, 2, 8), dim=-1).requires_grad_()
    b = (-a * torch.rand(2, 32, 2, 8)).detach().requires_grad_()
    q, k, v, g, state = (inputs[name] for name in ("q", "k", "v", "g", "state"))
    turned = [t.transpose(1, 2) for t in (q, k, v, a, b, g)]
    want, last = naive.dplr_recurrence(*turned, initial_state=state, output_final_state=True)
    got = delta_product(
        q * 8**-0.5,
        torch.stack([-b, k], 2),
        torch.stack([torch.zeros_like(v), v], 2),
        torch.ones(2, 32, 2, 2),
        g,
        torch.stack([a * (-g).exp(), torch.zeros_like(a)], 2),
        state,
        chunk=16,
    )
    leaves = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g, "state": state}
    assert_same(leaves, got, (want.transpose(1, 2), last), rtol=1e-3, atol=1e-3)


def test_shapes_that_do_not_fit() -> None:
    inputs = make(2, 9, 4, 3, 3)
    for name, t in inputs.items():
        with pytest.raises(ValueError, match=f"{name} is" if name != "v" else "q is"):
            delta_rule(**{**inputs, name: t[:, :3]})
    with pytest.raises(ValueError, match="power of two, got 12"):
        delta_rule(**inputs, chunk=12)
