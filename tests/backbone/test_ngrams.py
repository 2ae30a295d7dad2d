"""N-gram embeddings: the rows they look up, what that does to vectors, the whole contract, and models that hand their codes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.ngrams import FACTOR, MIX, NGrams
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.models import build_model
from mmlong.testing import check_mixer
from mmlong.training.optim import OptimConfig, parameter_groups


def row_of(codes: list[int], rows: int) -> int:
    """The definition, in whole numbers."""
    hashed = sum((code + 1) * pow(FACTOR, j) for j, code in enumerate(reversed(codes)))
    hashed = signed(hashed)
    hashed = signed((hashed ^ (hashed >> 32)) * MIX)
    return (hashed ^ (hashed >> 32)) % rows


def signed(number: int) -> int:
    """As 64 bits hold it."""
    return (number + 2**63) % 2**64 - 2**63


def filled(sizes: Any, **options: Any) -> NGrams:
    torch.manual_seed(0)
    one = NGrams(sizes, 8, **options).double().eval()
    nn.init.normal_(one.tables)
    return one


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("sizes", [[3], [1, 4, 2]])
def test_is_its_definition(sizes: list[int], width: int | None) -> None:
    one = filled(sizes, rows=50, width=width)
    codes = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(1))
    resets = torch.zeros(2, 21, dtype=torch.bool)
    resets[0, 9] = resets[1, 1] = resets[1, 2] = True
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    got, _ = one(x, None, Layout(codes=codes, resets=resets))
    want = x.clone()
    for b in range(2):
        document: list[int] = []
        for t in range(21):
            document = [*([] if resets[b, t] else document), int(codes[b, t])]
            looked = [
                one.tables[k * 50 + row_of(([-1] * n + document)[-n:], 50)] for k, n in enumerate(sizes)
            ]  # fmt: skip
            want[b, t] += sum(looked) if one.project is None else one.project(torch.cat(looked))  # type: ignore[arg-type]
    torch.testing.assert_close(got, want)


def test_rows_are_used_alike() -> None:
    """What the hash makes of the n-grams of a text is nearly as even as chance."""
    one = filled([2], rows=1000)
    codes = torch.cartesian_prod(torch.arange(97, 123), torch.arange(97, 123))
    rows = one._rows_of(codes + 1, None)[:, 0, 0]
    by_chance = 1000 * (1 - (1 - 1 / 1000) ** len(codes))
    assert rows.unique().numel() > 0.95 * by_chance


class Told(nn.Module):
    """A backbone whose tokens' codes are read off their first channel."""

    causal = streaming = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = Backbone(BackboneConfig(dim=dim, parts=[{"ngrams": [2, 3, 5], "rows": 40}]))
        nn.init.normal_(self.inner.parts()[0].tables)

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
        codes = (x[..., 0] > 0.2).long() + (x[..., 0] > 0.9).long()
        return self.inner(x, state, replace(layout or Layout(), codes=codes))


def test_the_contract() -> None:
    traits = Traits(paper="arXiv 2412.09871", state="constant")
    kept = ["manners", "rows", "causality", "pieces", "padding", "resets", "gradients", "segments", "bfloat16"]
    assert check_mixer(Told, traits=traits, dims=(16,), only=kept, probed=31)


@pytest.mark.parametrize("modality", [{"name": "text"}, {"name": "genome"}])
def test_a_classifier_reads_both_sides_behind_it(modality: dict[str, Any]) -> None:
    """In front of stages that pool, under any direction: padding changes nothing."""
    torch.manual_seed(0)
    m: Any = build_model({
        "modality": modality,
        "backbone": {
            "dim": [16, 24], "depth": [0, 1], "pool": [4], "direction": "alternate",
            "front": [{"ngrams": [2, 3], "rows": 64, "width": 5}], "mixers": ["mamba2"],
        },
        "head": {"name": "classify", "num_classes": 3},
    }).double().eval()  # fmt: skip
    (part,) = (p for p in m.modules() if isinstance(p, NGrams))
    tokens = torch.randint(0, 4, (2, 30))
    before, _ = m(tokens)
    nn.init.normal_(part.tables)
    after, _ = m(tokens)
    assert (before - after).abs().max() > 1e-3
    tokens[1, 17:] = 0
    padded, _ = m(tokens, None, Layout(lengths=torch.tensor([30, 17])))
    torch.testing.assert_close(padded[1:], m(tokens[1:, :17])[0])


def test_what_is_hidden_is_not_looked_up() -> None:
    torch.manual_seed(0)
    m: Any = build_model({
        "kind": "masked", "modality": {"name": "text"},
        "backbone": {"dim": 16, "depth": 1, "direction": "both", "front": [{"ngrams": [1, 3], "rows": 64}]},
    }).double().eval()  # fmt: skip
    (part,) = (p for p in m.modules() if isinstance(p, NGrams))
    nn.init.normal_(part.tables)
    tokens = torch.randint(0, 256, (2, 30))
    hidden = torch.rand(2, 30) < 0.3
    said, _ = m(tokens, hidden=hidden)
    others = torch.where(hidden, torch.randint(0, 256, (2, 30)), tokens)
    torch.testing.assert_close(m(others, hidden=hidden)[0], said)
    shown = torch.where(hidden, tokens, torch.randint(0, 256, (2, 30)))
    assert (m(shown, hidden=hidden)[0] - said).abs().max() > 1e-3


def test_tables_have_a_rate_of_their_own_and_do_not_decay() -> None:
    backbone = Backbone(BackboneConfig(dim=16, parts=[{"ngrams": 3, "rows": 9, "width": 4}, "mamba2"]))
    (mine,) = (p for name, p in backbone.named_parameters() if name.endswith("tables"))
    for name in ("adamw", "muon"):
        (group,) = (
            g for g in parameter_groups(backbone, OptimConfig(name=name)) if any(p is mine for p in g["params"])
        )
        assert group["weight_decay"] == 0
        assert group["lr"] == 10 * OptimConfig.lr
        assert name == "adamw" or group["use_fallback"]


def test_dropout_takes_whole_vectors() -> None:
    one = filled([1], rows=30, dropout=0.5).train()
    x, codes = torch.zeros(4, 200, 8, dtype=torch.float64), torch.full((4, 200), 7)
    y, _ = one(x, None, Layout(codes=codes))
    dropped = (y == 0).all(-1)
    assert 0.4 < float(dropped.double().mean()) < 0.6
    torch.testing.assert_close(y[~dropped], (2 * one.tables[row_of([7], 30)]).expand(int((~dropped).sum()), -1))


def test_what_is_refused() -> None:
    for options, message in (
        ({"ngrams": []}, "of one size or several"),
        ({"ngrams": [2, 2]}, "of one size or several"),
        ({"ngrams": [0, 2]}, "of one size or several"),
        ({"ngrams": 2, "rows": 0}, "at least one row"),
        ({"ngrams": 2, "width": 0}, "at least one row"),
        ({"ngrams": 2, "dropout": 1.0}, "at least one row"),
        ({"ngrams": 2, "row": 5}, "did you mean 'rows'"),
    ):
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=16, parts=[options]))
    for twice in ("reversible", "reverse_complement"):
        with pytest.raises(ValueError, match=f"leave {twice} false"):
            Backbone(BackboneConfig(dim=16, direction="both", front=[{"ngrams": 2, "rows": 8}], **{twice: True}))  # type: ignore[arg-type]
    backbone = {"dim": 16, "parts": [{"ngrams": 2, "rows": 8}, "mamba2"]}
    with pytest.raises(ValueError, match="was not told"):
        Backbone(BackboneConfig(**backbone))(torch.randn(1, 5, 16))
    with pytest.raises(ValueError, match="reads the codes of whole numbers"):
        build_model({"kind": "autoregressive", "modality": {"name": "audio", "rate": 8000}, "backbone": backbone})
