"""The optional backends of attention: masks against the intervals, calls against stand-ins; none of them needs a GPU."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import attention_backends as module
from mmlong.ops.attention import attention, attention_reference
from mmlong.ops.attention_backends import ATTENTION, block_ranges, document_bounds, flex_block_mask, xformers_bias
from mmlong.ops.backends import BackendError, Request
from mmlong.ops.visible import Visible, visible_in

WINDOWS = {
    "full": Visible(),
    "causal": Visible(None, 0),
    "left window": Visible(7, 0),
    "own key alone": Visible(0, 0),
    "both sides": Visible(7, 3),
    "all before, some after": Visible(None, 3),
}


@pytest.mark.parametrize("past", [0, 20])
@pytest.mark.parametrize("what", list(WINDOWS))
def test_xformers_masks_show_the_same_keys(what: str, past: int) -> None:
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    L, S, visible = 63, 63 + past, WINDOWS[what]
    made = xformers_bias(bias, visible, L, S)
    shown = torch.ones(L, S, dtype=torch.bool) if made is None else made.materialize((L, S)) == 0
    assert torch.equal(shown, visible.mask(L, S)[0, 0])


@pytest.fixture
def fake_fmha(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for ``mslk.attention.fmha`` that computes what xformers documents, ``(B, L, H, D)`` in and out."""
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    calls: list[dict[str, Any]] = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0) -> Tensor:
        calls.append({"q": tuple(q.shape), "k": tuple(k.shape), "p": p})
        scores = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
        if attn_bias is not None:
            scores = scores + attn_bias.materialize(tuple(scores.shape[-2:]))
        return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)

    fmha = types.ModuleType("mslk.attention.fmha")
    fmha.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    fmha.attn_bias = bias  # type: ignore[attr-defined]
    for name, found in (
        ("mslk", types.ModuleType("mslk")),
        ("mslk.attention", types.ModuleType("mslk.attention")),
        ("mslk.attention.fmha", fmha),
        ("mslk.attention.fmha.attn_bias", bias),
    ):
        monkeypatch.setitem(sys.modules, name, found)
    module._fmha.cache_clear()
    yield calls
    module._fmha.cache_clear()


@pytest.mark.parametrize("what", ["full", "causal", "left window", "both sides"])
def test_xformers_is_called_with_tokens_before_heads(what: str, fake_fmha: list[dict[str, Any]]) -> None:
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    got = ATTENTION["xformers"].run(q, k, v, WINDOWS[what], 0.25)
    assert fake_fmha == [{"q": (2, 9, 4, 8), "k": (2, 12, 4, 8), "p": 0.25}]
    torch.testing.assert_close(got, attention_reference(q, k, v, WINDOWS[what]), rtol=1e-5, atol=1e-5)


def test_neither_package_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mslk.attention.fmha", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, None)
    module._fmha.cache_clear()
    with pytest.raises(ImportError, match=r"mslk\.attention\.fmha: .*xformers\.ops\.fmha: "):
        module._fmha()


def test_asking_for_a_gpu_backend_on_a_cpu_says_why() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    for name, reason in (("xformers", "runs on cuda only, the tensors are on cpu"), ("varlen", "runs on cuda only")):
        with pytest.raises(BackendError, match=f"attention: backend '{name}' {reason}"):
            attention(q, k, v, Visible(None, 0), backend=name)
    with pytest.raises(BackendError, match=r"no gradient on cpu: use it under torch\.no_grad"):
        attention(q.requires_grad_(), k, v, backend="flex")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlong.ops import backends

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends.cuda_package.cache_clear()
    with pytest.raises(BackendError, match=r"needs mslk or xformers, not installed: pip install 'mmlong\[xformers\]'"):
        ATTENTION.choose(Request("cuda", torch.float16, "causal"), "xformers")
    backends.cuda_package.cache_clear()


@pytest.mark.parametrize("what", ["full", "causal", "left window", "both sides", "documents"])
@pytest.mark.parametrize(("L", "S"), [(257, 257), (63, 300), (1, 129)])
def test_flex_blocks_cover_what_is_seen(what: str, L: int, S: int) -> None:
    """A pair is seen if its block is full, or partly seen and the rule says so; the blocks that are listed leave out none."""
    visible = WINDOWS[what] if what != "documents" else Visible(None, 0, (S - L + torch.arange(L) // 40 * 40)[None])
    first, stop = visible.intervals(L, S)
    numbers, indices, full_numbers, full_indices = block_ranges(first, stop, S)
    mask, rule = flex_block_mask(visible, L, S, "cpu"), visible.mask(L, S)[0, 0]
    shown = torch.zeros(L, S, dtype=torch.bool)
    zero = torch.tensor(0)
    for row in range(numbers.shape[-1]):
        queries = torch.arange(row * 128, min(row * 128 + 128, L))
        listed = [(int(c), False) for c in indices[0, 0, row, : numbers[0, 0, row]]]
        listed += [(int(c), True) for c in full_indices[0, 0, row, : full_numbers[0, 0, row]]]
        assert len({c for c, _ in listed}) == len(listed), "a block is listed twice"
        for column, full in listed:
            keys = torch.arange(column * 128, min(column * 128 + 128, S))
            if full:
                shown[queries[:, None], keys] = True
            else:
                shown[queries[:, None], keys] = mask.mask_mod(zero, zero, queries[:, None], keys)
    assert torch.equal(shown, rule)


def test_documents_as_cumulative_lengths() -> None:
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 4] = resets[1, 0] = resets[1, 7] = True
    for causal in (True, False):
        visible = visible_in(Layout(resets=resets), 9, causal=causal)
        assert document_bounds(visible, 9, 2, "cpu").tolist() == [0, 4, 9, 16, 18]
    padded = visible_in(Layout(lengths=torch.tensor([9, 7])), 9, causal=False)
    assert document_bounds(padded, 9, 2, "cpu").tolist() == [0, 9, 16, 17, 18]
    with pytest.raises(ValueError, match="takes documents in a row"):
        document_bounds(Visible(None, 0, torch.tensor([[0, 0, 1, 1]])), 4, 1, "cpu")


def test_varlen_runs_over_documents_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, over_q: Tensor, over_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert options["window_size"] == (-1, 0)
        assert max_q == int(over_q.diff().max())
        parts = []
        for a, b in zip(over_q[:-1].tolist(), over_q[1:].tolist(), strict=True):
            one_q, one_k, one_v = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            parts.append(attention_reference(one_q, one_k, one_v, Visible(None, 0))[0].transpose(0, 1))
        return torch.cat(parts)

    stand_in = types.ModuleType("torch.nn.attention.varlen")
    stand_in.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 4] = True
    visible = visible_in(Layout(resets=resets), 9, causal=True)
    got = ATTENTION["varlen"].run(q, k, v, visible, 0.0)
    torch.testing.assert_close(got, attention_reference(q, k, v, visible), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "visible", "length", "dropout", "name"),
    [
        ("ragged", Visible(None, 0, torch.zeros(1, 1)), 32768, False, "flex"),
        ("ragged", Visible(None, 0, torch.zeros(1, 1)), 32768, True, "tiled"),
        ("ragged past", Visible(None, 0, torch.zeros(1, 1)), 32768, False, "flex"),
        ("ragged", Visible(None, 0, torch.zeros(1, 1)), 1024, False, "sdpa"),
        ("ragged window", Visible(4096, 0, torch.zeros(1, 1)), 32768, False, "flex"),
        ("ragged window", Visible(4096, 0, torch.zeros(1, 1)), 32768, True, "blocks"),
        ("ragged window", Visible(128, 0, torch.zeros(1, 1)), 32768, False, "blocks"),
        ("window", Visible(4096, 0), 32768, False, "blocks"),
        ("causal", Visible(None, 0), 32768, False, "sdpa"),
        ("past", Visible(None, 0), 32768, False, "sdpa"),
    ],
)
def test_what_a_gpu_takes_of_itself(kind: str, visible: Visible, length: int, dropout: bool, name: str) -> None:
    request = Request("cuda", torch.bfloat16, kind, dropout, True)
    order = module._fastest(kind, "cuda", 1, length, length, visible)
    assert ATTENTION.choose(request, "auto", order).name == name


def test_doctor_lists_them_all() -> None:
    rows = {r["backend"]: r for r in ATTENTION.describe("cpu")}
    assert list(rows) == ["sdpa", "tiled", "dense", "blocks", "flex", "varlen", "xformers"]
    assert [r for r, row in rows.items() if row["usable"] == "yes"] == ["sdpa", "tiled", "dense", "blocks", "flex"]
