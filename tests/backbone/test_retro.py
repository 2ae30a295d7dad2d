"""RETRO's part: the whole contract, its definition token by token, and generation that retrieves at chunk ends."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.retro import Retro, set_retriever
from mmlong.generation import generate
from mmlong.heads import Sampling
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.models import AutoregressiveModel, build_model
from mmlong.testing import check_mixer

KEPT = ("manners", "rows", "causality", "pieces", "padding", "resets", "gradients", "segments", "bfloat16")
LOCAL: dict[str, Any] = {"name": "local", "window": 5, "heads": 2}


def parts(chunk: int = 4, **options: Any) -> list[Any]:
    return [LOCAL, {"retro": chunk, "codes": 16, "layers": 1, "heads": 2, **options}, LOCAL]


def oracle(k: int, r: int, codes: int = 16) -> Any:
    """Neighbours that follow from the chunk alone; of some there are fewer, or none, or they end early."""

    def retrieve(chunks: Tensor, training: bool) -> Tensor:
        number = (chunks * torch.arange(1, chunks.shape[1] + 1)).sum(1)
        near = (number[:, None, None] * 7 + torch.arange(k)[:, None] * 5 + torch.arange(r) * 3) % codes
        near[number % 5 == 0] = -1
        near[number % 3 == 0, -1] = -1
        near[number % 4 == 1, 0, r // 2 :] = -1
        return near

    return retrieve


class Made(nn.Module):
    """A backbone that is told tokens, which here follow from its vectors in steps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = Backbone(BackboneConfig(dim=dim, parts=parts()[:2], ffn="none"))
        self.causal, self.streaming = self.inner.causal, self.inner.streaming
        set_retriever(self.inner, oracle(2, 8))

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
        tokens = ((x[..., :4].detach() > 0).long() * torch.tensor([1, 2, 4, 8], device=x.device)).sum(-1)
        return self.inner(x, state, dataclasses.replace(layout or Layout(), codes=tokens))


@pytest.mark.slow
def test_the_contract() -> None:
    traits = Traits(paper="of the house", causal=True, streaming=True, state="growing")
    assert check_mixer(Made, traits=traits, dims=(8,), only=KEPT, probed=31)


def by_definition(part: Retro, x: Tensor, tokens: Tensor) -> Tensor:
    """One document ``(L, D)``, a position after the other."""
    m, H, rows = part.chunk, part.heads, []

    def attend(q: Tensor, kv: nn.Linear, of: Tensor) -> Tensor:
        k, v = kv(of).chunk(2, -1)
        heads = []
        for a, b, c in zip(q.chunk(H, -1), k.chunk(H, -1), v.chunk(H, -1), strict=True):
            heads.append((a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c)
        return torch.cat(heads, -1)

    for p in range(len(x)):
        u = p // m - 1
        y = x[p]
        if u >= 0:
            own = part.norm_chunk(x[u * m + 1 : u * m + m + 1])
            encoded = []
            for neighbour in part.retrieve(tokens[u * m + 1 : u * m + m + 1][None])[0]:
                length = int((neighbour >= 0).sum())
                if length == 0:
                    continue
                h = part.encoder.value(neighbour[:length]) + part.encoder.place[:length]
                for layer in part.encoder.layers:
                    normed = layer.norms[0](h)
                    h = h + layer.among.out(attend(layer.among.query(normed), layer.among.key_value, normed))
                    q = layer.to_chunk.query(layer.norms[1](h))
                    h = h + layer.to_chunk.out(attend(q, layer.to_chunk.key_value, own))
                    a, b = layer.ffn.w_in(layer.norms[2](h)).chunk(2, -1)
                    h = h + layer.ffn.w_out(F.silu(a) * b)
                encoded.append(part.encoder.norm(h))
            if encoded:
                q = part.query(part.norm(x[p]) + part.place[p % m])
                y = y + part.out(attend(q[None], part.key_value, torch.cat(encoded))[0])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("length", "m"), [(63, 8), (7, 8), (23, 1)])
def test_is_its_definition(length: int, m: int) -> None:
    torch.manual_seed(0)
    part = Retro(m, 8, codes=16, heads=2).double()
    part.retriever = oracle(2, 2 * m)
    x, tokens = torch.randn(3, length, 8, dtype=torch.float64), torch.randint(16, (3, length))
    y, _ = part(x, None, Layout(codes=tokens))
    torch.testing.assert_close(y, torch.stack([by_definition(part, *row) for row in zip(x, tokens, strict=True)]))
    # A batch of unlike documents.
    resets = torch.zeros(3, length, dtype=torch.bool)
    resets[0, 5] = resets[2, length // 2] = True
    layout = Layout(lengths=torch.tensor([length, length - 3, length]), resets=resets, codes=tokens)
    y, _ = part(x, None, layout)
    for row, cuts in enumerate(([0, 5, length], [0, length - 3], [0, length // 2, length])):
        for a, b in itertools.pairwise(cuts):
            torch.testing.assert_close(y[row, a:b], by_definition(part, x[row, a:b], tokens[row, a:b]))


def test_a_model_predicts_the_next_chunk_by_what_was_found_for_this() -> None:
    """The prediction of a token depends on what was retrieved for the chunk before its own, and on no other."""
    torch.manual_seed(0)
    model = build_model(
        {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 16, "parts": [{"retro": 4}]}, "head": {}}
    ).eval()  # fmt: skip
    asked: list[Tensor] = []

    def retrieve(chunks: Tensor, training: bool) -> Tensor:
        asked.extend(chunks)
        return chunks[:, None, :1].expand(-1, 2, 8).contiguous()

    set_retriever(model, retrieve)
    tokens = torch.arange(100, 118)[None]
    y, _ = model(tokens)
    assert [chunk.tolist() for chunk in asked] == [list(range(n, n + 4)) for n in (100, 104, 108, 112)]
    before = retrieve

    def other(chunks: Tensor, training: bool) -> Tensor:
        found = before(chunks, training)
        return torch.where((chunks[:, 0] == 104)[:, None, None], 7, found)

    set_retriever(model, other)
    changed = (model(tokens)[0] - y).abs().amax((0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [8, 9, 10, 11]


def model_of(chunk: int = 4, **backbone: Any) -> AutoregressiveModel:
    torch.manual_seed(0)
    made = build_model(
        {"kind": "autoregressive", "modality": {"name": "text"}, "head": {},
         "backbone": {"dim": 16, "parts": parts(chunk, codes=256), **backbone}}
    )  # fmt: skip
    assert isinstance(made, AutoregressiveModel)
    set_retriever(made, oracle(2, 2 * chunk, 256))
    return made


def test_generation_retrieves_by_itself() -> None:
    """Greedy, with a prompt and without, it is what the whole forward says, piece by piece."""
    model = model_of().double().eval()
    for prompt in (None, torch.randint(256, (2, 10))):
        made = generate(model, 40, prompt, batch=2, sampling=Sampling(temperature=0), piece=7)
        with torch.no_grad():
            whole = model(made)[0]
        begun = 0 if prompt is None else 10
        assert torch.equal(whole.argmax(-1)[:, begun:], made[:, begun:])


def test_training_with_checkpoints_and_packed_rows() -> None:
    model = model_of().train()
    tokens = torch.randint(256, (2, 30))
    resets = torch.zeros(2, 30, dtype=torch.bool)
    resets[1, 11] = True
    found = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        y, _ = model(tokens, None, Layout(resets=resets))
        F.cross_entropy(y.flatten(0, 1), tokens.flatten()).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    # And with nothing found there is a gradient of zero, and not none.
    model.zero_grad()
    model(tokens[:, :3])[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_program_can_hold_it(tmp_path: Path) -> None:
    from mmlong.export import Bounds, ExportError, export_model

    with pytest.raises(ExportError, match="goes by what the tokens are"):
        export_model(model_of(), tmp_path / "out", length=Bounds(2, 64))


def test_what_is_refused() -> None:
    x, tokens = torch.randn(1, 9, 8), torch.zeros(1, 9, dtype=torch.long)
    part = Retro(4, 8)
    told = Layout(codes=tokens)
    with pytest.raises(ValueError, match="was not told"):
        part(x)
    with pytest.raises(ValueError, match="nothing to retrieve from"):
        part(x, None, told)
    inside = Backbone(BackboneConfig(dim=8, parts=[{"pool": 2, "parts": [{"retro": 4}]}]))
    with pytest.raises(ValueError, match="not inside a part that makes tokens of its own"):
        inside(x, None, told)
    for answer, said in (
        (torch.zeros(2, 2, 7, dtype=torch.long), "needs int64"),
        (torch.zeros(2, 2, 8), "needs int64"),
        (torch.full((2, 2, 8), 256), "where codes is 256"),
    ):
        part.retriever = lambda chunks, training, answer=answer: answer
        with pytest.raises(ValueError, match=said):
            part(x, None, told)
    for name in ("chunk", "neighbours", "layers"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            Retro(**{"chunk": 4, "dim": 8, name: 0})
    with pytest.raises(ValueError, match="do not divide"):
        Retro(4, 8, heads=3)
    with pytest.raises(ValueError, match="no part"):
        set_retriever(nn.Linear(1, 1), oracle(1, 1))
    with pytest.raises(ValueError, match="has none"):
        build_model(
            {"kind": "autoregressive", "modality": {"name": "audio", "rate": 8000}, "head": {},
             "backbone": {"dim": 8, "parts": [{"retro": 4}]}}
        )  # fmt: skip
