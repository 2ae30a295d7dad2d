"""Memorizing attention against its definition, token by token, and an implementation of others; what it remembers, and what it teaches."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import Memorizing
from mmlong.ops.rotary import rotary_reference


def unit(t: Tensor) -> Tensor:
    return t / t.norm(dim=-1, keepdim=True)


def by_definition(m: Memorizing, x: Tensor) -> Tensor:
    """One document ``(T, D)``."""
    H, G, d = m.heads, m.kv_heads, m.head_dim
    q, k, v = m.q_proj(x).view(-1, H, d), m.k_proj(x).view(-1, G, d), m.v_proj(x).view(-1, G, d)
    q, k = unit(q) * m.scale[:, None], unit(k)
    places = torch.arange(x.shape[0])
    turned_q, turned_k = (rotary_reference(t, places, m.rope_base) for t in (q, k)) if m.rope else (q, k)
    rows = []
    for i in range(x.shape[0]):
        near, heads = max(0, i // m.segment * m.segment - m.near), []
        least = 0 if m.capacity is None else max(0, near - m.capacity)
        for h in range(H):
            g = h // (H // G)
            y = (turned_k[near : i + 1, g] @ turned_q[i, h]).softmax(0) @ v[near : i + 1, g]
            gate = torch.sigmoid(m.gate[h])
            y = (1 - gate) * y
            if near > least:
                old_k, old_v = k[least:near, g].detach(), v[least:near, g].detach()
                scores = old_k @ q[i, h]
                best = scores.detach().topk(min(m.topk, near - least)).indices
                y = y + gate * (scores[best].softmax(0) @ old_v[best])
            heads.append(y)
        rows.append(torch.cat(heads))
    return m.out_proj(torch.stack(rows))


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (7, {}),
        (31, {}),
        (40, {"near": 0, "rope": False}),
        (40, {"capacity": 9}),
        (40, {"topk": 100, "capacity": 3, "near": 2}),
    ],
    ids=str,
)
@pytest.mark.oracle("definition: token by token", "memorizing")
def test_is_its_definition(same_as: Any, length: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    m = Memorizing(16, **{"segment": 6, "near": 5, "topk": 4, "heads": 4, "kv_heads": 2, **options}).double()
    with torch.no_grad():
        m.gate.normal_()
    x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_definition(m, x[0])[None], None))


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """memorizing-transformers-pytorch's module of layers alone: its package imports an index for GPUs and more than it declares, which is not needed here."""
    name = "memorizing_transformers_pytorch"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("memorizing-transformers-pytorch is not installed")
    package, memory, exts = types.ModuleType(name), types.ModuleType("knn_memory"), types.ModuleType("einops_exts")
    package.__path__ = list(spec.submodule_search_locations)
    vars(memory).update(KNNMemoryList=list, DEFAULT_KNN_MEMORY_MEMMAP_DIRECTORY="")
    vars(exts).update(repeat_many=None)
    for key, module in ((name, package), (f"{name}.knn_memory", memory), ("einops_exts", exts)):
        monkeypatch.setitem(sys.modules, key, module)
    monkeypatch.delitem(sys.modules, f"{name}.{name}", raising=False)
    return importlib.import_module(f"{name}.{name}")


class Remembered:
    """What their layer asks of a memory, exactly and in float64: theirs is an approximate index in float32."""

    def __init__(self) -> None:
        self.kv = torch.zeros(2, 0, 2, 4, dtype=torch.float64)

    def add(self, kv: Tensor) -> None:
        self.kv = torch.cat([self.kv, kv.detach()], 1)

    def search(self, q: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        found = torch.zeros(*q.shape[:3], topk, 2, 4, dtype=q.dtype)
        n = min(topk, self.kv.shape[1])
        best = torch.einsum("bhid,bjd->bhij", q.detach(), self.kv[:, :, 0]).topk(n).indices
        for b in range(2):
            found[b, :, :, :n] = self.kv[b][best[b]]
        return found, (torch.arange(topk) < n).expand(found.shape[:4])


@pytest.mark.parametrize(("near", "topk"), [(0, 4), (0, 20), (5, 4)])
@pytest.mark.oracle("memorizing-transformers-pytorch: KNNAttention, its halves gated", "memorizing")
def test_against_memorizing_transformers_pytorch(held: Any, layers: Any, near: int, topk: int) -> None:
    """Segment by segment, its memories handed on. Theirs has one softmax over what is local and what is remembered, the paper (and ours) two and a gate: so one of their layers is given no memory, and another by its positional bias nothing local, with the gate in their output projections. Without positions otherwise."""
    torch.manual_seed(0)
    H, n, options = 3, 6, {"dim": 12, "heads": 3, "dim_head": 4, "num_retrieved_memories": topk}
    m = Memorizing(12, segment=n, near=near, topk=topk, heads=H, kv_heads=1, rope=False).double()
    local, far = (layers.KNNAttention(**options, xl_max_memories=near).double() for _ in range(2))
    with torch.no_grad():
        m.gate.normal_()
        for theirs, gate in ((local, 1 - torch.sigmoid(m.gate)), (far, torch.sigmoid(m.gate))):
            theirs.scale.copy_(m.scale.log()[:, None, None])
            theirs.to_q.weight.copy_(m.q_proj.weight)
            theirs.to_kv.weight.copy_(torch.cat([m.k_proj.weight, m.v_proj.weight]))
            theirs.to_out.weight.copy_(m.out_proj.weight * gate.repeat_interleave(4))
    x = torch.randn(2, 40, 12, dtype=torch.float64, requires_grad=True)
    memory, before, rows = Remembered(), None, []
    nothing_local = torch.full((1, H, n, n + near), -1e30, dtype=torch.float64)
    for piece in x.split(n, 1):
        y, after = local(piece, knn_memory=Remembered(), xl_memory=before, add_knn_memory=False)
        begun = memory.kv.shape[1] > 0
        # With a memory that is empty yet, its softmax would go back to what is local; it is called all the same, as it fills the memory.
        distant, _ = far(piece, knn_memory=memory, xl_memory=before, rel_pos_bias=nothing_local)
        rows.append(y + distant if begun else y)
        before = after
    got, want = m(x)[0], torch.cat(rows, 1)
    if near:
        # Theirs has no gradient to the tokens before the segment, as Transformer-XL has none, ours has.
        want = want.detach()
    held(x, (got, None), (want, None))
    torch.testing.assert_close(got, want)
    if not near:
        weights = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_what_is_remembered_is_not_taught() -> None:
    torch.manual_seed(0)
    m = Memorizing(8, segment=4, near=4, topk=3, heads=1).double()
    x = torch.randn(1, 30, 8, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(m(x)[0][0, 29].sum(), x)
    touched = g[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == list(range(24, 30))
    # And yet it is read: another value there is another result.
    with torch.no_grad():
        y = m(x)[0][0, 29]
        changed = x.clone()
        changed[0, :10] += 1
        assert not torch.allclose(m(changed)[0][0, 29], y)


def test_a_bounded_memory_forgets_the_oldest_and_no_more() -> None:
    m = Memorizing(8, segment=4, near=2, topk=3, capacity=6, heads=1)
    state = None
    for n in range(1, 40):
        _, state = m(torch.randn(1, 1, 8), state)
        assert state["k"].shape[2] == m.slots(n)["k"] <= 4 + 2 + 6


def test_options_are_checked() -> None:
    for option in ("segment", "topk", "capacity"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            Memorizing(8, **{option: 0})
    with pytest.raises(ValueError, match="near must be at least 0, got -1"):
        Memorizing(8, near=-1)


def test_faiss_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"mmlong\[faiss\]"):
        Memorizing(8, search="faiss")
    with pytest.raises(ValueError, match="exact or faiss"):
        Memorizing(8, search="guess")


@pytest.mark.parametrize("options", [{}, {"capacity": 9}, {"topk": 100}], ids=str)
def test_faiss_finds_the_same(options: dict[str, Any]) -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    given = {"segment": 6, "near": 5, "topk": 4, "heads": 4, "kv_heads": 2, **options}
    one, other = Memorizing(16, **given), Memorizing(16, **given, search="faiss")
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 40, 16)
    found = []
    for m in (one, other):
        taught = x.clone().requires_grad_(True)
        y = m(taught)[0]
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [taught, *m.parameters()])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
