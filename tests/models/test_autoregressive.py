"""Autoregressive models over every registered causal mixer: no token sees itself, pieces equal the whole, greedy generation equals the whole's argmax."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from mmlong.generation import generate, read, score
from mmlong.heads import GREEDY, Sampling
from mmlong.layout import Layout
from mmlong.modalities import Modality
from mmlong.modalities.contract import MODALITIES
from mmlong.models import AutoregressiveModel, build_model, load_model, save_model
from mmlong.testing.kinds import MORE_KINDS

CODES = 11
STREAMING = MORE_KINDS


class Codes(Modality):
    """Codes with learned absolute places, so that a wrong count shows."""

    codes = CODES

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.table = torch.nn.Embedding(CODES, dim)
        self.where = torch.nn.Embedding(128, dim)

    def values(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens)

    def places(self, index: torch.Tensor | None, length: int) -> torch.Tensor:
        return self.where(torch.arange(length)[None] if index is None else index.clamp(0, 127))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tests only: other tests loop over what is registered."""
    monkeypatch.setitem(MODALITIES._entries, "test_codes", Codes)


def model(mixer: str = "mamba2", modality: dict[str, Any] | None = None, **head: Any) -> AutoregressiveModel:
    torch.manual_seed(0)
    config = {
        "kind": "autoregressive",
        "modality": modality or {"name": "test_codes"},
        "backbone": {"dim": 16, "depth": 2, "mixers": [mixer]},
        "head": head,
    }
    built = build_model(config)
    assert isinstance(built, AutoregressiveModel)
    # Trained weights are not small: an error must not hide behind near-uniform predictions.
    with torch.no_grad():
        built.head.linear.weight.mul_(4)
    return built.eval()


def codes(batch: int, length: int) -> torch.Tensor:
    return torch.randint(CODES, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("mixer", STREAMING)
def test_greedy_generation_is_the_argmax_of_the_whole(mixer: str) -> None:
    module = model(mixer).double()
    prompt = codes(2, 19)
    found = generate(module, 24, prompt, sampling=GREEDY, piece=7)
    assert torch.equal(found[:, :19], prompt)
    with torch.no_grad():
        whole = module(found)[0].argmax(-1)
    assert torch.equal(whole[:, 19:], found[:, 19:])
    assert len(set(found[:, 19:].flatten().tolist())) > 1


@pytest.mark.parametrize("mixer", STREAMING)
def test_pieces_padding_and_documents(mixer: str) -> None:
    module = model(mixer).double()
    tokens = codes(2, 41)
    with torch.no_grad():
        whole, final = module(tokens)
        pieces, state = [], None
        for start, stop in ((0, 1), (1, 18), (18, 41)):
            y, state = module(tokens[:, start:stop], state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
        assert state["passed"].tolist() == final["passed"].tolist() == [41, 41]
        padded, after = module(tokens, None, Layout(lengths=torch.tensor([41, 23])))
        torch.testing.assert_close(padded[1, :23], whole[1, :23])
        assert after["passed"].tolist() == [41, 23]
        torch.testing.assert_close(after["last"][1], module.modality.values(tokens[1:, 22:23])[0])
        resets = torch.zeros(2, 41, dtype=torch.bool)
        resets[:, 17] = True
        packed, counted = module(tokens, None, Layout(resets=resets))
        torch.testing.assert_close(packed[:, :17], whole[:, :17])
        torch.testing.assert_close(packed[:, 17:], module(tokens[:, 17:])[0])
        assert counted["passed"].tolist() == [24, 24]


def test_a_row_without_tokens_keeps_its_state() -> None:
    module = model().double()
    tokens = codes(2, 9)
    resets = torch.zeros(2, 4, dtype=torch.bool)
    with torch.no_grad():
        _, before = module(tokens)
        _, after = module(codes(2, 4), before, Layout(lengths=torch.tensor([4, 0]), resets=resets))
    assert after["passed"].tolist() == [13, 9]
    torch.testing.assert_close(after["last"][1], before["last"][1])


def test_no_prediction_depends_on_its_own_token_or_later_ones() -> None:
    module = model("attention").double()
    tokens = codes(1, 20)
    other = tokens.clone()
    other[0, 12:] = (other[0, 12:] + 1) % CODES
    with torch.no_grad():
        a, b = module(tokens)[0], module(other)[0]
    assert torch.equal(a[:, :13], b[:, :13])
    assert not torch.allclose(a[:, 13], b[:, 13])


def test_all_short_texts_together_have_probability_one() -> None:
    module = model().double()
    every = torch.cartesian_prod(torch.arange(CODES), torch.arange(CODES))
    with torch.no_grad():
        chance = module(every)[0].log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1).exp()
    assert float(chance.sum()) == pytest.approx(1, abs=1e-9)


def test_score_is_the_likelihood_in_bits_however_it_is_cut() -> None:
    module = model().double()
    tokens = codes(1, 50)
    with torch.no_grad():
        wanted = -module(tokens)[0].log_softmax(-1).gather(-1, tokens[..., None]).sum() / math.log(2)
    for cut in (50, 13, 1):
        bits, numbers = score(module, (tokens[:, i : i + cut] for i in range(0, 50, cut)))
        assert bits == pytest.approx(float(wanted), rel=1e-9)
        assert numbers == 50


def test_draws_depend_on_the_generator_alone_and_rows_differ() -> None:
    module = model()
    module.train()
    draws = [generate(module, 30, batch=3, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0][0], draws[0][1])
    assert module.training  # left as it was
    seen: list[torch.Tensor] = []
    streamed = generate(module, 5, batch=2, sampling=Sampling(top_k=2), on_token=seen.append)
    assert torch.equal(torch.cat(seen, 1), streamed)


def test_images_of_real_values() -> None:
    modality = {"name": "image", "size": [5, 6], "channels": 3, "order": "raster"}
    module = model(modality=modality)
    assert module.config["head"] == {"name": "logistic_mixture", "channels": 3, "levels": 256}
    tokens = generate(module, 30, batch=2)
    raw = module.modality.decode(tokens)
    assert raw.shape == (2, 3, 5, 6)
    again, _ = module.encode(raw)
    torch.testing.assert_close(again, tokens, atol=1e-6, rtol=0)  # what is drawn is a picture, exactly
    half = tokens[:, :15]
    assert torch.equal(generate(module, 15, half)[:, :15], half)
    assert int(read(module, half)["passed"][0]) == 15
    with pytest.raises(ValueError, match="30 tokens; 31 were asked for"):
        generate(module, 16, half)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("offsets", [[1], [1, 6, 7, 5]])
def test_linear_prediction_moves_the_means(offsets: list[int], each: bool) -> None:
    torch.manual_seed(0)
    config = {
        "kind": "autoregressive", "modality": {"name": "image", "size": [5, 6], "channels": 3, "order": "raster"},
        "backbone": {"dim": 8, "depth": 1}, "linear_prediction": offsets, "linear_each": each,
    }  # fmt: skip
    module = build_model(config).double().eval()
    assert isinstance(module, AutoregressiveModel)
    torch.nn.init.normal_(module.linear.weight, std=0.3)
    tokens = generate(module, 30, batch=2)
    with torch.no_grad():
        whole, final = module(tokens)
        # The definition: the means move by a sum over earlier tokens of the same picture.
        plain = module.forward_head(module.forward_features(tokens)[0])
        k = module.head.mixtures
        weights = module.linear.weight  # of each component, (offsets, 3, k, 3)
        weights = weights if each else weights[:, :, None].expand(-1, -1, k, -1)
        moved = tokens.new_zeros(2, 30, 3, k)
        for t in range(30):
            for offset, weight in zip(offsets, weights, strict=True):
                if t >= offset:
                    moved[:, t] += torch.einsum("ckd,bd->bck", weight, tokens[:, t - offset])
        wanted = plain.clone()
        wanted[..., k : 4 * k] += moved.flatten(2)
        torch.testing.assert_close(whole, wanted)
        first, state = module(tokens[:, :4])
        rest, state = module(tokens[:, 4:], state)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole)
        torch.testing.assert_close(state["tokens"], final["tokens"])
        # One at a time, as generation goes.
        state, one = module.begin(2), []
        for t in range(30):
            prediction, state = module.peek(state)
            state = module.put(state, tokens[:, t : t + 1])
            one.append(prediction)
        torch.testing.assert_close(torch.cat(one, 1), whole)
        # A second picture behind the first knows nothing of it.
        resets = torch.zeros(2, 60, dtype=torch.bool)
        resets[:, 30] = True
        both, _ = module(torch.cat([tokens.flip(0), tokens], 1), None, Layout(resets=resets))
        torch.testing.assert_close(both[:, 30:], whole)


def test_linear_prediction_is_for_numbers() -> None:
    config = {"kind": "autoregressive", "modality": {"name": "test_codes"}, "backbone": {"dim": 8, "depth": 1}}
    with pytest.raises(ValueError, match="codes have no order"):
        build_model({**config, "linear_prediction": [1]})
    image = {"name": "image", "size": [5, 6], "order": "raster"}
    with pytest.raises(ValueError, match="at least 1, none twice"):
        build_model({**config, "modality": image, "linear_prediction": [1, 1]})
    with pytest.raises(TypeError, match="no part 'linear_predicton'.*did you mean 'linear_prediction'"):
        build_model({**config, "linear_predicton": [1]})


def test_saved_and_loaded(tmp_path: Any) -> None:
    module = model()
    save_model(module, tmp_path)
    again = load_model(tmp_path).eval()
    assert isinstance(again, AutoregressiveModel)
    assert torch.equal(again(codes(1, 9))[0], module(codes(1, 9))[0])


def test_what_cannot_be_autoregressive_says_why() -> None:
    config = {"kind": "autoregressive", "modality": {"name": "test_codes"}, "backbone": {"dim": 8, "depth": 1}}
    with pytest.raises(ValueError, match="direction: causal"):
        build_model({**config, "backbone": {"dim": 8, "depth": 2, "direction": "alternate"}})
    with pytest.raises(ValueError, match="one thing a sequence"):
        build_model({**config, "head": {"name": "classify", "num_classes": 3}})
    with pytest.raises(KeyError, match="unknown kind of model 'autoregresive'.*did you mean 'autoregressive'"):
        build_model({**config, "kind": "autoregresive"})
    with pytest.raises(ValueError, match="prompt"):
        generate(model(), 3, codes(1, 4)[:, :0])


@pytest.mark.parametrize("places", [None, 64])
def test_a_code_in_place_of_a_start_vector(places: int | None, tmp_path) -> None:
    """What is predicted is what a plain model of the same parts predicts behind that code; a table shared with the head is one parameter, also of a copy and of what was saved."""
    torch.manual_seed(0)
    parts = {
        "modality": {"name": "tokens", "codes": 10, "special": 1, "places": places},
        "backbone": {"dim": 16, "depth": 2, "mixers": ["rwkv4"]},
    }
    head = {"name": "categorical", "tied": True, "bias": False}
    built = build_model({"kind": "autoregressive", "start": 10, **parts, "head": head}).double().eval()
    plain = build_model({**parts, "head": {**head, "num_classes": 10}}).double().eval()
    assert "start" not in built.state_dict()
    assert not any(name.startswith("head") for name in built.state_dict())
    plain.load_state_dict(built.state_dict())
    tokens = torch.randint(10, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = plain(torch.cat([torch.full((2, 1), 10), tokens], 1))[0][:, :-1]
        torch.testing.assert_close(built(tokens)[0], want)
        state, found = built.begin(2), []
        for t in range(5):
            prediction, state = built.peek(state)
            state = built.put(state, tokens[:, t : t + 1])
            found.append(prediction)
        torch.testing.assert_close(torch.cat(found, 1), want[:, :5])
        other = copy.deepcopy(built)
        other.modality.code.weight.mul_(2)
        assert not torch.allclose(other(tokens)[0], want)
        torch.testing.assert_close(built(tokens)[0], want)
        save_model(built, tmp_path)
        torch.testing.assert_close(load_model(tmp_path).double().eval()(tokens)[0], want, rtol=1e-4, atol=1e-4)
    grown = copy.deepcopy(plain)
    grown.reset_classifier(4)
    assert grown(tokens)[0].shape == (2, 23, 4)


def test_starts_and_tables_that_there_are_not() -> None:
    config = {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 16, "depth": 1}, "head": {}}
    with pytest.raises(ValueError, match=r"start is a code that the modality embeds, 0 \.\. 255; got 256"):
        build_model({**config, "start": 256})
    audio = {"name": "audio", "rate": 8000}
    with pytest.raises(ValueError, match="start is a code that the modality embeds; got 3"):
        build_model({**config, "modality": audio, "start": 3})
    with pytest.raises(ValueError, match="head.tied shares the modality's table"):
        build_model({**config, "modality": {"name": "mulaw", "rate": 8000}, "head": {"tied": True}})
