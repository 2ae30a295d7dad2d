"""Backends of other people's kernels: masks held against the intervals, calls against stand-ins, since no GPU is asked for."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import attention_backends as backends
from mmlong.ops.attention import attention, attention_reference
from mmlong.ops.attention_backends import BLOCK, document_bounds, flex_block_mask, xformers_bias
from mmlong.ops.backends import BackendError
from mmlong.ops.visible import Visible, visible_in

PATTERNS = {
    "full": (Visible(), 300, 300),
    "causal": (Visible(None, 0), 300, 300),
    "past": (Visible(None, 0), 130, 300),
    "window": (Visible(70, 40), 300, 300),
    "wide window": (Visible(150, 290), 300, 300),
    "left window": (Visible(70, 0), 300, 300),
    "left window with a past": (Visible(70, 0), 130, 300),
}
RAGGED = {
    "documents": (Visible(None, 0, (torch.arange(300) // 90 * 90)[None]), 300, 300),
    "rows": (visible_in(Layout(lengths=torch.tensor([300, 129])), 300, causal=False, window=100), 300, 300),
}


def draw(L: int, S: int, B: int = 2, H: int = 4, G: int = 2) -> list[Tensor]:
    return [torch.randn(B, h, n, 16) for h, n in ((H, L), (G, S), (G, S))]


# FlexAttention


@pytest.mark.parametrize("what", [*PATTERNS, *RAGGED])
def test_flex_blocks_are_those_that_are_seen(what: str) -> None:
    visible, L, S = {**PATTERNS, **RAGGED}[what]
    mask = visible.mask(L, S)[:, 0]
    first, stop = visible.intervals(L, S)
    counts, indices, full_counts, full_indices = backends.block_ranges(first, stop, S)
    for b in range(mask.shape[0]):
        for r in range(-(-L // BLOCK)):
            queries = mask[b, r * BLOCK : (r + 1) * BLOCK]
            blocks = [queries[:, c * BLOCK : (c + 1) * BLOCK] for c in range(-(-S // BLOCK))]
            whole = [c for c, part in enumerate(blocks) if bool(part.all()) and part.shape[1] == BLOCK]
            some = [c for c, part in enumerate(blocks) if bool(part.any()) and c not in whole]
            listed = indices[b, 0, r, : counts[b, 0, r]].tolist()
            assert sorted(full_indices[b, 0, r, : full_counts[b, 0, r]].tolist()) == whole
            # The range of blocks is an interval too, so it may hold a block that only other rows of queries see.
            assert set(some) <= set(listed)
            assert not set(listed) & set(whole)


@pytest.mark.parametrize("what", [*PATTERNS, *RAGGED])
def test_flex_mask_in_flex_attention(what: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    visible, L, S = {**PATTERNS, **RAGGED}[what]
    q, k, v = draw(L, S)
    with torch.no_grad():
        got = flex_attention(q, k, v, block_mask=flex_block_mask(visible, L, S, "cpu"), enable_gqa=True)
    torch.testing.assert_close(got, attention_reference(q, k, v, visible), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_flex_compiled_on_a_cpu() -> None:
    """The real kernel, which goes by the lists of blocks."""
    visible, L, S = PATTERNS["window"]
    q, k, v = draw(L, S)
    with torch.no_grad():
        got = attention(q, k, v, visible, backend="flex")
    torch.testing.assert_close(got, attention_reference(q, k, v, visible), rtol=1e-4, atol=1e-5)


def test_flex_does_not_train_on_a_cpu() -> None:
    q, k, v = draw(9, 9)
    with pytest.raises(BackendError, match="backend 'flex' has no gradient on cpu: use it under torch.no_grad"):
        attention(q.requires_grad_(), k, v, backend="flex")
    with pytest.raises(BackendError, match="backend 'flex' takes bfloat16, float16, float32, not float64"):
        attention(*(t.detach().double() for t in (q, k, v)), backend="flex")


# Variable lengths


def loop_of_sdpa(
    q: Tensor, k: Tensor, v: Tensor, over_q: Tensor, over_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """What ``varlen_attn`` documents, as a loop over sequences: windows are aligned to the last key."""
    left, right = options["window_size"]
    parts = []
    for i in range(len(over_q) - 1):
        one_q = q[over_q[i] : over_q[i + 1]]
        one_k, one_v = (t[over_k[i] : over_k[i + 1]] for t in (k, v))
        assert len(one_q) <= max_q
        assert len(one_k) <= max_k
        mask = Visible(None if left < 0 else left, None if right < 0 else right).mask(len(one_q), len(one_k))[0]
        heads = (t.transpose(0, 1) for t in (one_q, one_k, one_v))
        parts.append(F.scaled_dot_product_attention(*heads, mask, enable_gqa=options["enable_gqa"]).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("torch.nn.attention.varlen")
    stand_in.varlen_attn = loop_of_sdpa  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("what", list(PATTERNS))
def test_varlen_of_full_rows(what: str) -> None:
    visible, L, S = PATTERNS[what]
    q, k, v = draw(L, S)
    got = backends._varlen(q, k, v, visible, 0.0)
    torch.testing.assert_close(got, attention_reference(q, k, v, visible), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_of_documents(causal: bool) -> None:
    resets = torch.zeros(2, 40, dtype=torch.bool)
    resets[0, [5, 6, 30]] = True
    resets[1, [0, 20]] = True
    lengths = torch.tensor([40, 33])
    visible = visible_in(Layout(lengths=lengths, resets=resets), 40, causal=causal)
    q, k, v = draw(40, 40)
    got, want = backends._varlen(q, k, v, visible, 0.0), attention_reference(q, k, v, visible)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[b, :, :n], want[b, :, :n], rtol=1e-4, atol=1e-5)
    padding = [80] if causal else [*range(73, 81)]
    assert document_bounds(visible, 40, 2, "cpu").tolist() == [0, 5, 6, 30, 40, 60, *padding]


def test_varlen_refuses_intervals_that_are_not_documents() -> None:
    odd = Visible(None, 0, torch.tensor([[0, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="takes documents in a row, and these intervals are others"):
        document_bounds(odd, 5, 1, "cpu")


# xformers


@pytest.mark.parametrize("what", list(PATTERNS))
def test_xformers_bias_is_what_is_seen(what: str) -> None:
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    visible, L, S = PATTERNS[what]
    made = xformers_bias(bias, visible, L, S)
    if made is None:
        assert bool(visible.mask(L, S).all())
        return
    shown = made.materialize((L, S)) == 0
    assert torch.equal(shown, visible.mask(L, S)[0, 0])


def kernel(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, p: float) -> Tensor:
    """Attention on ``(B, L, H, D)`` under a bias, as fmha documents it."""
    assert p == 0.0
    mask = None if attn_bias is None else attn_bias.materialize((q.shape[1], k.shape[1]))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2)


@pytest.mark.parametrize("package", ["mslk.attention.fmha", "xformers.ops.fmha"])
def test_xformers_dispatch(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mslk first, xformers where it is missing; heads laid out, groups repeated and the bias passed as fmha wants them."""
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    monkeypatch.setitem(sys.modules, "mslk", None)  # not there, unless put there below
    parents = package.split(".")
    for depth in range(1, len(parents) + 1):
        module = types.ModuleType(".".join(parents[:depth]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[package].memory_efficient_attention = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{package}.attn_bias", bias)
    backends._fmha.cache_clear()
    try:
        assert backends._fmha()[0].__name__ == package
        for visible, L, S in PATTERNS.values():
            q, k, v = draw(L, S)
            got = backends._xformers(q, k, v, visible, 0.0)
            torch.testing.assert_close(got, attention_reference(q, k, v, visible), rtol=1e-4, atol=1e-5)
    finally:
        backends._fmha.cache_clear()


def test_xformers_missing_and_misplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(9, 9)
    with pytest.raises(BackendError, match="backend 'xformers' runs on cuda only, the tensors are on cpu"):
        attention(q, k, v, backend="xformers")
    for name in ("mslk.attention.fmha", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, None)
    backends._fmha.cache_clear()
    with pytest.raises(
        ImportError, match="'xformers' cannot be imported: mslk.attention.fmha: .*; xformers.ops.fmha: "
    ):
        backends._fmha()


def test_what_doctor_is_told() -> None:
    rows = {r["backend"]: r for r in backends.ATTENTION.describe("cpu")}
    assert set(rows) == {"sdpa", "tiled", "blocks", "flex", "varlen", "xformers"}
    assert [n for n, r in rows.items() if r["usable"] == "no"] == ["varlen", "xformers"]
    assert "no gradient on cpu" in rows["flex"]["reason"]
