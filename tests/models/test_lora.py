"""Adapters of low rank: every reader of a weight sees them, their gradient is the chain rule's, merged they are the same function to the bit, and nothing else of a model changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmlong.generation import generate, stream
from mmlong.heads import GREEDY
from mmlong.mixers import list_mixers
from mmlong.mixers.weights import named_weights, written
from mmlong.models import (
    AutoregressiveModel,
    LoraConfig,
    Model,
    add_lora,
    build_model,
    load_model,
    merge_lora,
    remove_lora,
    save_model,
)
from mmlong.models.lora import LowRank, adapters, fold, is_adapter, merged, plain_name, plain_state
from mmlong.models.patterns import matching, no_match

OPTIONS: dict[str, dict[str, Any]] = {"axial_decoder": {"width": 4}, "gmlp": {"max_length": 16}}


def pixels(mixer: Any = "min_gru", **backbone: Any) -> Model:
    torch.manual_seed(0)
    return build_model(
        {
            "modality": {"name": "image", "size": [4, 4], "order": "raster"},
            "backbone": {"dim": 16, "depth": 1, "mixers": [mixer], "direction": "alternate", **backbone},
            "head": {"name": "classify", "num_classes": 3},
        }
    ).eval()


def letters(**backbone: Any) -> AutoregressiveModel:
    torch.manual_seed(0)
    options = {"dim": 16, "depth": 2, "mixers": ["mamba2", {"name": "local", "window": 6}], **backbone}
    model = build_model(
        {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {**options, "direction": "causal"}}
    )
    assert isinstance(model, AutoregressiveModel)
    return model.eval()


def shaken(model: Model, **config: Any) -> list[str]:
    """Adapters that do something: B drawn, where it begins at zero."""
    names = add_lora(model, LoraConfig(**{"rank": 2, "alpha": 3.0, **config}))
    shake(model)
    return names


def shake(model: Model) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for *_, one in adapters(model):
            one.b.copy_(0.3 * torch.randn(one.b.shape, generator=draw))


def picture(model: Model) -> tuple[Tensor, Any]:
    raw = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return model.encode(raw)


def said(model: Model) -> Tensor:
    tokens, layout = picture(model)
    return model(tokens, None, layout)[0]


def holds(model: Model) -> None:
    """The function is that of the sum, but for products that go by where in memory a weight lies, and the adapters' gradient is the sum's by the chain rule."""
    plain = copy.deepcopy(model)
    model.backbone.requires_grad_(False)  # torch's recurrent layers are computed otherwise where they do not train
    before = said(model)
    names = add_lora(model, LoraConfig(rank=2, alpha=3.0))
    inside = [f"backbone.{name}.weight" for name, m in plain.backbone.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(names) == sorted(inside)
    torch.testing.assert_close(
        said(model), before, rtol=1e-5, atol=1e-6
    )  # nothing changes before an adapter is trained
    shake(model)
    plain.load_state_dict(plain_state(model))
    plain.backbone.requires_grad_(False)
    for name in names:
        plain.get_parameter(name).requires_grad_(True)
    adapted, summed = said(model), said(plain)
    torch.testing.assert_close(adapted, summed, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(adapted, before, rtol=1e-3, atol=1e-4)
    draw = torch.randn(summed.shape, generator=torch.Generator().manual_seed(2))
    (adapted * draw).sum().backward()
    (summed * draw).sum().backward()
    whole = dict(plain.named_parameters())
    reached = 0
    for name, _, _, one in adapters(model):
        found, gradient = one.b.grad, whole[name].grad
        wanted = torch.zeros_like(one.b) if gradient is None else one.scale * gradient @ one.a.detach().mT
        size = float(wanted.abs().max())
        torch.testing.assert_close(
            torch.zeros_like(wanted) if found is None else found, wanted, rtol=1e-3, atol=1e-4 * size + 1e-7
        )
        reached += size > 0
    assert reached, "some adapter has a gradient"
    for name, p in model.named_parameters():
        assert p.requires_grad == (is_adapter(name) or not name.startswith("backbone.")), name


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_reads_its_adapters(mixer: str) -> None:
    holds(pixels({"name": mixer, **OPTIONS.get(mixer, {})}))


@pytest.mark.parametrize(
    "backbone",
    [
        {"ffn": "switch"},
        {"ffn": "product_key_memory"},
        {"reversible": True},
        {"checkpoint": True},
        {"direction": "both"},
        {"parts": ["min_gru", ["pool 4", ["min_gru x 2"], "up"]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_block_reads_its_adapters(backbone: dict[str, Any]) -> None:
    holds(pixels(**backbone))


def test_weights_that_are_in_no_linear_layer() -> None:
    model = pixels("rg_lru")
    name = next(n for n, _ in model.named_parameters() if n.endswith("gate_weight"))
    plain = copy.deepcopy(model)
    assert shaken(model, on=["*.gate_weight"]) == [n for n, _ in plain.named_parameters() if n.endswith("gate_weight")]
    ((_, _, _, one), *_) = adapters(model)
    weight = dict(plain.named_parameters())[name]
    assert one.b.shape == (*weight.shape[:-1], 2)
    assert one.a.shape == (*weight.shape[:-2], 2, weight.shape[-1])
    plain.load_state_dict(plain_state(model))
    assert torch.equal(said(model), said(plain))


def test_a_rank_is_at_most_the_matrix_s() -> None:
    model = pixels("mamba2")
    shaken(model, rank=100, on=["re:conv_weight$", "re:out_proj"])
    for name, module, at, one in adapters(model):
        weight = getattr(module, at)
        assert one.a.shape[-2] == min(weight.shape), name
        assert float(one.scale) == pytest.approx(0.03)


def test_pieces_and_generation_are_those_of_the_sum() -> None:
    model = letters()
    shaken(model)
    tokens = torch.randint(256, (3, 23), generator=torch.Generator().manual_seed(1))
    plain = letters()
    plain.load_state_dict(plain_state(model))
    with torch.no_grad():
        whole, _ = model(tokens)
        assert torch.equal(whole, plain(tokens)[0])
        parts, state = [], None
        for i, j in ((0, 9), (9, 10), (10, 23)):
            part, state = model(tokens[:, i:j], state)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    prompt = tokens[:1, :5]
    drawn = generate(plain, 12, prompt, sampling=GREEDY)
    assert torch.equal(generate(model, 12, prompt, sampling=GREEDY), drawn)
    assert torch.equal(torch.cat(list(stream(model, 12, prompt, sampling=GREEDY)), 1), drawn[:, 5:])
    assert all(one.folded is None for *_, one in adapters(model))


def test_merged_for_a_while() -> None:
    model = letters()
    shaken(model)
    tokens = torch.randint(256, (1, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(tokens)[0]
        with merged(model):
            weight = model.backbone.blocks()[0].mixer.in_proj
            assert weight.weight is weight.weight, "made once"
            assert torch.equal(model(tokens)[0], before)
            with merged(model):
                pass
            assert weight.weight is weight.weight, "the inner one leaves what the outer one made"
            model.train()
            with pytest.raises(RuntimeError, match="train outside"):
                model(tokens)
            model.eval()
        assert weight.weight is not weight.weight
        assert torch.equal(model(tokens)[0], before)


@pytest.mark.parametrize("merge", [True, False])
def test_taken_off_it_is_a_plain_model(merge: bool) -> None:
    model, plain = letters(), letters()
    shaken(model)
    twin = copy.deepcopy(model)
    tokens = torch.randint(256, (1, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = (model if merge else plain)(tokens)[0]
        (merge_lora if merge else remove_lora)(model)
        assert torch.equal(model(tokens)[0], wanted)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        if merge:
            assert torch.equal(twin(tokens)[0], wanted), "a copy keeps its own"
        plain.load_state_dict(model.state_dict())
        shaken(model)
        assert not torch.equal(model(tokens)[0], wanted)


def test_names_of_the_base_are_loaded_and_saved(tmp_path: Path) -> None:
    model, base = letters(), letters()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.01)
    shaken(model)
    kept = {name: t.clone() for name, t in model.state_dict().items() if is_adapter(name)}
    assert kept
    model.load_state_dict(base.state_dict())
    state = model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in kept.items())
    bare = plain_state(model, merge=False)
    assert bare.keys() == base.state_dict().keys()
    assert all(torch.equal(bare[name], t) for name, t in base.state_dict().items())
    twin = letters()
    shaken(twin, rank=2)
    twin.load_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in twin.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict({name: t for name, t in state.items() if not name.endswith("weight.0.a")})
    save_model(model, tmp_path)
    tokens = torch.randint(256, (1, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path).eval()(tokens)[0], model(tokens)[0])


def test_dropout_is_on_the_inputs_of_a_and_in_training_only() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    one = LowRank(weight, LoraConfig(rank=3, alpha=6.0, dropout=0.5))
    nn.init.normal_(one.b)
    whole = weight + 2 * one.b @ one.a
    torch.testing.assert_close(one.eval()(weight), whole)
    one.train()
    delta = (one(weight) - weight).detach()
    dropped = delta.abs().sum(0) == 0
    torch.testing.assert_close(delta[:, ~dropped], 2 * (whole - weight)[:, ~dropped])
    assert any(bool(((one(weight) - weight).abs().sum(0) == 0).any()) for _ in range(20))


def test_under_autocast_the_sum_is_in_full_precision() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    one = LowRank(weight, LoraConfig(rank=3))
    nn.init.normal_(one.b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = one(weight)
    assert torch.equal(inside, one(weight))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.lists(st.integers(1, 3), max_size=2), st.data())
def test_a_state_dict_folds_to_what_the_weight_is(
    rank: int, rows: int, columns: int, lead: list[int], data: st.DataObject
) -> None:
    weight = torch.randn(*lead, rows, columns)
    one = LowRank(weight, LoraConfig(rank=rank, alpha=data.draw(st.floats(0.1, 50))))
    nn.init.normal_(one.b)
    owner = data.draw(st.sampled_from(["", "a.", "a.parametrized.b."]))
    inside = f"{owner}parametrizations.weight."
    parts = {f"{inside}0.{name}": t for name, t in one.state_dict().items()}
    state = {f"{inside}original": weight, **parts, "other": torch.ones(1)}
    found = fold(state)
    assert found.keys() == {f"{owner}weight", "other"}
    assert torch.equal(found[f"{owner}weight"], one.eval()(weight))
    assert torch.equal(fold(state, merge=False)[f"{owner}weight"], weight)
    assert fold(found) == found
    assert plain_name(f"{inside}original") == f"{owner}weight"
    assert plain_name(f"{inside}0.b") == f"{owner}weight.lora_b"


def test_weights_by_name_as_they_are_used() -> None:
    model = pixels("mamba2")
    mixer = model.backbone.blocks()[0].mixer
    names = named_weights(mixer).keys()
    assert names == dict(mixer.named_parameters()).keys()
    count = written(mixer)
    shaken(model)
    found = named_weights(mixer)
    assert found.keys() == names
    for _, module, at, one in adapters(mixer):
        weight = module.parametrizations[at].original
        assert any(t.shape == weight.shape and torch.equal(t, one(weight)) for t in found.values())
    with torch.no_grad():
        next(adapters(mixer))[3].b.add_(1)
    assert written(mixer) != count


def test_what_makes_no_sense_is_refused() -> None:
    for wrong, said_of in (
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
    ):
        with pytest.raises(ValueError, match=said_of):
            LoraConfig(**wrong)
    model = pixels("mamba2")
    with pytest.raises(
        ValueError, match=r"lora.on: no parameter matches '\*.in_porj.weight' \(did you mean 'in_proj'\?\)"
    ):
        add_lora(model, LoraConfig(on=["*.in_porj.weight"]))
    with pytest.raises(ValueError, match="no regular expression"):
        add_lora(model, LoraConfig(on=["re:("]))
    assert not list(adapters(model))
    add_lora(model, LoraConfig())
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, LoraConfig())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

    with pytest.raises(ValueError, match="weight of two modules"):
        add_lora(Two(), LoraConfig())
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(nn.GRU(4, 4), LoraConfig())
    with pytest.raises(ValueError, match="parametrization of its own"):
        add_lora(
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4), "bias", 0), nn.Linear(4, 4)),
            LoraConfig(),
        )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.from_regex(r"[a-c]{1,2}(\.[a-c0-9]{1,2}){0,3}", fullmatch=True), min_size=1, unique=True))
def test_patterns(names: list[str]) -> None:
    for name in names:
        assert name in matching(names, name, "option")
        module = name.rpartition(".")[0]
        if module:
            assert set(matching(names, module, "o")) >= {n for n in names if n.startswith(f"{module}.")}
            assert name in matching(names, f"{module}.*", "o")
    assert matching(names, "*", "o") == names == matching(names, "re:", "o")
    assert matching(names, "re:^zz", "o") == []


def test_the_nearest_name_is_told() -> None:
    names = ["backbone.stages.0.0.mixer.in_proj.weight", "backbone.norm.weight", "head.linear.weight"]
    assert "did you mean 'backbone.stages.0'" in no_match(names, "backbone.stage.0.*", "o")
    assert "did you mean 'mixer'" in no_match(names, "*.mixr.*", "o")
    assert "did you mean 'head'" in no_match(names, "haed", "o")


@pytest.mark.slow
def test_compiled_blocks() -> None:
    model, plain = letters(), letters()
    shaken(model)
    plain.load_state_dict(plain_state(model))
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    for block in model.backbone.blocks():
        block.compile(backend="aot_eager", fullgraph=False)
    model(tokens)[0].square().sum().backward()
    plain(tokens)[0].square().sum().backward()
    whole = dict(plain.named_parameters())
    for name, _, _, one in adapters(model):
        torch.testing.assert_close(one.b.grad, one.scale * whole[name].grad @ one.a.detach().mT, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_exported_it_is_the_sum(tmp_path: Path) -> None:
    from mmlong.export import Bounds, export_model, load

    model = pixels("min_gru")
    shaken(model)
    raw = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        wanted = model(*_of(model, raw))[0]
    export_model(model, tmp_path / "out", batch=Bounds(1, 4))
    torch.testing.assert_close(load(tmp_path / "out")(raw), wanted, rtol=1e-4, atol=1e-5)
    assert list(adapters(model)), "the model is left as it is"


def _of(model: Model, raw: Tensor) -> tuple[Any, ...]:
    tokens, layout = model.encode(raw)
    return tokens, None, layout
