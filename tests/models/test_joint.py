"""Joint models: spans are a hand-made concatenation, one modality is an autoregressive model, pieces equal the whole, and what is generated is the whole's argmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmlong.generation import generate, generate_spans, read
from mmlong.heads import GREEDY
from mmlong.layout import Layout
from mmlong.models import JointModel, Spans, build_model, lay_spans, load_model, save_model

SIZE = [3, 5]
PIXELS = 15
CONFIG: dict[str, Any] = {
    "kind": "joint",
    "modalities": {
        "picture": {"name": "image", "size": SIZE, "channels": 3, "order": "raster"},
        "words": {"name": "text"},
        "sound": {"name": "mulaw", "rate": 8000},
    },
    "backbone": {"dim": 16, "depth": 2, "mixers": ["mamba2"]},
    "linear_prediction": {"picture": [1, 5]},
    "orders": [["picture", "words"], ["words", "sound", "picture"]],
}


def model(**changes: Any) -> JointModel:
    torch.manual_seed(0)
    built = build_model({**CONFIG, **changes})
    assert isinstance(built, JointModel)
    with torch.no_grad():  # trained weights are not small: an error must not hide behind near-uniform predictions
        for voice in built.voices.values():
            voice.head.linear.weight.mul_(4)
            voice.start.mul_(30)
            if voice.linear is not None:
                voice.linear.weight.add_(torch.randn_like(voice.linear.weight) * 0.2)
    return built.eval().double()


def raw(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "picture": torch.randint(256, (batch, 3, *SIZE), dtype=torch.uint8, generator=draw),
        "words": torch.randint(256, (batch, 7), dtype=torch.uint8, generator=draw),
        "sound": torch.rand(batch, 9, generator=draw) * 2 - 1,
    }


def rows(module: JointModel, batch: int = 3) -> tuple[Spans, Layout]:
    """Ragged rows: two orders, uneven words and sounds, one row without sound."""
    lengths = {"words": torch.tensor([7, 1, 4][:batch]), "sound": torch.tensor([2, 9, 0][:batch])}
    orders = [module.orders[1], module.orders[0], module.orders[1]][:batch]
    return module.encode(raw(batch), lengths, orders)


def test_spans_are_laid_one_behind_another() -> None:
    module = model()
    spans, layout = rows(module)
    given = raw(3)
    assert layout.lengths is not None
    assert layout.lengths.tolist() == [7 + 2 + PIXELS, PIXELS + 1, 4 + PIXELS]
    assert spans.kind.shape == (3, 24)
    words, sound, picture = (module.names.index(name) for name in ("words", "sound", "picture"))
    assert spans.kind[0].tolist() == [words] * 7 + [sound] * 2 + [picture] * PIXELS
    assert spans.kind[1].tolist() == [picture] * PIXELS + [words] + [-1] * 8
    assert spans.kind[2].tolist() == [words] * 4 + [picture] * PIXELS + [-1] * 5
    assert spans.index[0].tolist() == [*range(7), *range(2), *range(PIXELS)]
    assert torch.equal(spans.tokens["words"][0, :7], given["words"][0].long())
    assert torch.equal(spans.tokens["words"][1, PIXELS], given["words"][1, 0].long())
    assert not spans.tokens["words"][0, 7:].any()
    pixels = module.voices["picture"].modality.encode(given["picture"])[0]
    assert torch.equal(spans.tokens["picture"][2, 4 : 4 + PIXELS], pixels[2])
    assert torch.equal(spans.pick("words")[0], torch.cat([given["words"][0], given["words"][1, :1], given["words"][2, :4]]).long())  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mixer", ["mamba2", "attention", "s4d"])
def test_a_row_is_what_a_hand_made_concatenation_gives(mixer: str, batch: int) -> None:
    """One row at a time, no padding, no scatter: the vectors written out as the docstring says them, then the loss of each head."""
    module = model(backbone={"dim": 16, "depth": 2, "mixers": [mixer]})
    spans, layout = rows(module, batch)
    prediction, _ = module(spans, None, layout)
    found = module.losses(prediction, spans)
    given = raw(batch)
    lengths = {"words": [7, 1, 4], "sound": [2, 9, 0]}
    wanted = dict.fromkeys(module.names, 0.0)
    numbers = dict.fromkeys(module.names, 0)
    for row in range(batch):
        vectors, cuts, last = [], [], torch.zeros(1, 1, 16, dtype=torch.float64)
        for name in [module.orders[1], module.orders[0], module.orders[1]][row]:
            voice = module.voices[name]
            part = given[name][row : row + 1]
            if name in lengths:
                part = part[:, : lengths[name][row]]
            if part.shape[-1] == 0:
                continue
            tokens = voice.modality.encode(part)[0]
            values = voice.modality.values(tokens)
            line = torch.cat([last, values[:, :-1]], 1)
            line[:, 0] = line[:, 0] + voice.start
            places = voice.modality.places(None, tokens.shape[1])
            vectors.append(line if places is None else line + places)
            cuts.append((name, tokens))
            last = values[:, -1:]
        features, _ = module.backbone(torch.cat(vectors, 1))
        at = 0
        for name, tokens in cuts:
            voice = module.voices[name]
            y = voice.head(features[:, at : at + tokens.shape[1]])
            if voice.linear is not None:
                before = torch.cat([torch.zeros(1, 5, 3), tokens[:, :-1]], 1)
                y = voice.head.move(y, voice.linear(before.double(), tokens.shape[1], torch.arange(PIXELS)[None]))
            nats, count = voice.head.loss(y, tokens)
            wanted[name] += nats
            numbers[name] += int(count)
            at += tokens.shape[1]
    for name in module.names:
        torch.testing.assert_close(found[name][0], torch.as_tensor(wanted[name], dtype=torch.float64), msg=name)
        assert int(found[name][1]) == numbers[name]


def test_one_modality_is_an_autoregressive_model() -> None:
    module = model(modalities={"words": {"name": "text"}}, orders=None, linear_prediction=None)
    other: Any = build_model({"kind": "autoregressive", "modality": {"name": "text"}, "backbone": CONFIG["backbone"]})
    other = other.double().eval()
    mine = {key.removeprefix("voices.words."): value for key, value in module.state_dict().items()}
    other.load_state_dict(mine)
    words = raw(3)["words"]
    lengths = torch.tensor([7, 3, 5])
    spans, layout = module.encode({"words": words}, {"words": lengths})
    prediction, _ = module(spans, None, layout)
    tokens, plain = other.encode(words, lengths)
    wanted, _ = other(tokens, None, plain)
    torch.testing.assert_close(prediction["words"][0], wanted[plain.valid(7)])


def gathered(spans: Spans, pieces: list[tuple[Spans, dict[str, torch.Tensor]]], name: str) -> torch.Tensor:
    """Predictions of pieces, each row by row, put back where they belong."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    start = 0
    for piece, prediction in pieces:
        found |= {
            (int(row), start + int(column)): value
            for row, column, value in zip(*piece.where(name), prediction[name][0], strict=True)
        }
        start += piece.kind.shape[1]
    return torch.stack([found[int(row), int(column)] for row, column in zip(*spans.where(name), strict=True)])


@pytest.mark.parametrize("cuts", [[5, 11], [1, 2, 7, 8, 23], list(range(1, 24))], ids=["three", "odd", "one at a time"])
@pytest.mark.parametrize("mixer", ["mamba2", "attention"])
def test_whole_is_pieces(mixer: str, cuts: list[int]) -> None:
    module = model(backbone={"dim": 16, "depth": 2, "mixers": [mixer]})
    spans, layout = rows(module)
    with torch.no_grad():
        whole, final = module(spans, None, layout)
        pieces, state = [], None
        for start, stop in zip([0, *cuts], [*cuts, 24], strict=True):
            prediction, state = module(spans.slice(start, stop), state, layout.slice(start, stop))
            pieces.append((spans.slice(start, stop), prediction))
    for name in module.names:
        torch.testing.assert_close(gathered(spans, pieces, name), whole[name][0], msg=name)
    torch.testing.assert_close(state["last"], final["last"])
    torch.testing.assert_close(state["passed"], final["passed"])
    torch.testing.assert_close(state["tails"], final["tails"])
    assert final["passed"].tolist() == [PIXELS, 1, PIXELS]


def test_nothing_later_and_no_padding_is_seen() -> None:
    """Other tokens behind a row's end, or later in it, change nothing before them."""
    module = model()
    spans, layout = rows(module)
    longer = raw(3)
    longer["words"][1, 1:] = 7
    longer["sound"][:2, 2:] = 0.5
    again, _ = module.encode(longer, {"words": torch.tensor([7, 1, 4]), "sound": torch.tensor([2, 9, 0])}, [
        module.orders[1], module.orders[0], module.orders[1]])  # fmt: skip
    other = raw(3)
    other["picture"][0] = 0
    changed, _ = module.encode(other, {"words": torch.tensor([7, 1, 4]), "sound": torch.tensor([2, 9, 0])}, [
        module.orders[1], module.orders[0], module.orders[1]])  # fmt: skip
    with torch.no_grad():
        whole = module(spans, None, layout)[0]
        padded = module(again, None, layout)[0]
        later = module(changed, None, layout)[0]
    for name in module.names:
        torch.testing.assert_close(padded[name], whole[name], rtol=0, atol=0)
    torch.testing.assert_close(later["words"], whole["words"], rtol=0, atol=0)
    torch.testing.assert_close(later["sound"], whole["sound"], rtol=0, atol=0)
    torch.testing.assert_close(later["picture"][:, 0], whole["picture"][:, 0], rtol=0, atol=0)
    assert not torch.equal(later["picture"][:, 1], whole["picture"][:, 1])


def test_a_span_sees_the_last_token_of_the_span_before_it() -> None:
    module = model()
    spans, layout = module.encode({name: raw(1)[name] for name in ("picture", "words")})
    values = spans.tokens["picture"].clone().double()
    values[0, PIXELS - 1] += 0.5
    other = Spans(spans.kind, spans.index, {**spans.tokens, "picture": values})
    with torch.no_grad():
        a, b = module(spans, None, layout)[0]["words"], module(other, None, layout)[0]["words"]
    assert float((a - b)[:, 0].abs().max()) > 1e-4


def test_documents_in_a_row_are_apart() -> None:
    module = model()
    spans, _ = module.encode({name: raw(1)[name] for name in ("picture", "words")})
    other, _ = module.encode({name: raw(1, 5)[name] for name in ("words", "sound")}, orders=[["words", "sound"]])
    both = Spans.of([torch.cat(two, 1) for two in zip(other.tensors(), spans.tensors(), strict=True)], module.names)
    resets = torch.zeros(1, both.kind.shape[1], dtype=torch.bool)
    resets[:, other.kind.shape[1]] = True
    with torch.no_grad():
        alone = module(spans)[0]["picture"]
        packed = module(both, None, Layout(resets=resets))[0]["picture"]
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize("mixer", ["mamba2", "attention", "hyena"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_goes_on_in_another_modality(mixer: str, batch: int) -> None:
    """A caption of a picture and a picture of a caption, greedily: the argmax of the whole."""
    module = model(
        backbone={"dim": 16, "depth": 2, "mixers": [mixer]},
        modalities={"picture": {"name": "image_bytes", "size": SIZE, "order": "raster"}, "words": {"name": "text"}},
        linear_prediction=None,
        orders=[["picture", "words"], ["words", "picture"]],
    )
    draw = torch.Generator().manual_seed(1)
    given = {
        "picture": torch.randint(256, (batch, PIXELS), generator=draw),
        "words": torch.randint(256, (batch, 6), generator=draw),
    }
    for first, second, length in (("picture", "words", 8), ("words", "picture", PIXELS)):
        prompt, then = module.speaking(first), module.speaking(second)
        with torch.no_grad():
            state = read(prompt, given[first], piece=4)
        made = generate(then, length, sampling=GREEDY, state=then.open(state))
        counts = [torch.full((batch,), t.shape[1]) for t in (given[first], made)]
        parts = {first: (given[first], counts[0]), second: (made, counts[1])}
        spans, layout = lay_spans({name: parts[name] for name in module.names}, [[first, second]] * batch)
        with torch.no_grad():
            whole = module(spans, None, layout)[0][second][0].argmax(-1)
        assert torch.equal(whole.view(batch, length), made)
        assert len(set(made.flatten().tolist())) > 1
        # Going on inside the span: its beginning is a prompt.
        begun = generate(then, length - 3, made[:, :3], sampling=GREEDY, state=then.open(state))
        assert torch.equal(begun, made)


def test_numbers_are_generated_with_their_linear_prediction() -> None:
    """What generation predicts of each pixel is what the whole forward does, from nothing and after words."""
    module = model()
    given = raw(2)["words"].long()
    words, picture = module.speaking("words"), module.speaking("picture")
    with torch.no_grad():
        state = picture.open(read(words, given))
        made = generate(picture, PIXELS, sampling=GREEDY, state=state)
        spans, layout = lay_spans(
            {
                "picture": (made, torch.tensor([PIXELS] * 2)),
                "words": (given, torch.tensor([7, 7])),
                "sound": (torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 0])),
            },
            [["words", "picture"]] * 2,
        )
        prediction = module(spans, None, layout)[0]["picture"]
        torch.testing.assert_close(module.voices["picture"].head.sample(prediction, GREEDY).view_as(made), made)
    assert generate(picture, PIXELS, batch=2).shape == (2, PIXELS, 3)


def test_a_batch_of_one_modality_gives_every_parameter_a_gradient() -> None:
    """DDP waits for all of them; those of a modality that is not there are zero."""
    module = model().train()
    spans, layout = module.encode({"words": raw(2)["words"]})
    prediction, _ = module(spans, None, layout)
    sum(loss for loss, _ in module.losses(prediction, spans).values()).backward()  # type: ignore[union-attr]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        if name.startswith(("voices.picture", "voices.sound")):
            assert not parameter.grad.any(), name
    assert module.voices["words"].head.linear.weight.grad.any()


def test_rows_of_different_modalities_in_one_batch() -> None:
    module = model()
    given = raw(2)
    spans, layout = module.encode(
        {"words": given["words"], "picture": given["picture"][:1]},
        orders=[["words"], ["picture"], ["words"]],
        rows={"words": torch.tensor([0, 2]), "picture": torch.tensor([1])},
        counted=torch.tensor([True, True, False]),
    )
    assert layout.lengths is not None
    assert layout.lengths.tolist() == [7, PIXELS, 0]
    alone, plain = module.encode({"picture": given["picture"][:1]}, orders=[["picture"]])
    with torch.no_grad():
        torch.testing.assert_close(module(spans, None, layout)[0]["picture"], module(alone, None, plain)[0]["picture"])


def test_saved_and_loaded(tmp_path: Path) -> None:
    module = model().float()
    save_model(module, tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, JointModel)
    assert again.orders == module.orders
    assert again.config == module.config
    spans, layout = rows(module)
    with torch.no_grad():
        a, b = module(spans, None, layout)[0], again.eval()(spans, None, layout)[0]
    for name in module.names:
        assert torch.equal(a[name], b[name])
    assert module.tokens_per_sample() is None
    assert model(orders=[["picture"]]).tokens_per_sample() == PIXELS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {}}, "at least one modality"),
        ({"orders": [["picture", "word"]]}, "orders has 'word'; did you mean 'words'|orders has 'word' "),
        ({"orders": [["words", "words"]]}, "none twice"),
        ({"heads": {"sounds": {}}}, "heads has 'sounds'"),
        ({"linear_prediction": {"words": [1]}}, "codes have no order"),
        ({"heads": {"words": {"name": "classify", "num_classes": 3}}}, "predicts one thing a sequence"),
        ({"modality": {"name": "text"}}, "has no part 'modality'"),
        ({"modalities": {"a.b": {"name": "text"}}, "orders": None, "linear_prediction": None}, "cannot be a name here"),
        ({"backbone": {"dim": 16, "depth": 2, "mixers": ["mamba2"], "direction": "alternate"}}, "a joint model needs"),
        ({"backbone": {"dim": 16, "depth": 1, "mixers": ["image_local_2d"]}}, "reads a grid, and a row of spans has none"),
    ],
    ids=["none", "order", "twice", "head", "linear", "classify", "part", "dot", "both sides", "grid"],
)  # fmt: skip
def test_what_cannot_be_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build_model({**CONFIG, **changes})


def test_bad_batches_are_told() -> None:
    module = model()
    with pytest.raises(ValueError, match="the batch has 'word'"):
        module.encode({"word": raw(1)["words"]})
    with pytest.raises(ValueError, match=r"have \[2, 3\] rows"):
        module.encode({"words": raw(2)["words"], "picture": raw(3)["picture"]})
    with pytest.raises(ValueError, match="names words twice"):
        module.encode({"words": raw(1)["words"]}, orders=[["words", "words"]])
    with pytest.raises(ValueError, match="speaking has 'sond'"):
        module.speaking("sond")
    with pytest.raises(ValueError, match="head for each modality"):
        module.get_classifier()


def test_spans_are_given_or_drawn() -> None:
    """The greedy caption of a picture, by the loop over spans; what is drawn first is what comes next reads."""
    module = model(orders=None)
    picture = module.voices["picture"].modality.encode(raw(2)["picture"])[0]
    made = generate_spans(module, ["picture", "words"], {"words": 5}, {"picture": picture}, sampling=GREEDY, piece=4)
    words = module.speaking("words")
    with torch.no_grad():
        state = words.open(read(module.speaking("picture"), picture))
    assert torch.equal(made["words"], generate(words, 5, sampling=GREEDY, state=state))
    both = generate_spans(module, ["words", "sound"], {"words": 4, "sound": 6}, batch=3, sampling=GREEDY)
    again = generate_spans(module, ["words", "sound"], {"sound": 6}, {"words": both["words"]}, sampling=GREEDY)
    assert both["sound"].shape == (3, 6)
    assert torch.equal(both["sound"], again["sound"])
    with pytest.raises(ValueError, match="how many samples of sound to draw"):
        generate_spans(module, ["words", "sound"], {"words": 4})
    with pytest.raises(ValueError, match="picture is given, and the order has only words"):
        generate_spans(module, ["words"], {"words": 4}, {"picture": picture})


@pytest.mark.parametrize("batch", [1, 3])
def test_speaking_is_the_joint_model_on_spans_of_one_modality(batch: int) -> None:
    """Predictions and state of a piece that goes on inside a span, behind a span of another modality."""
    module = model()
    given = raw(batch)
    words, picture = module.speaking("words"), module.speaking("picture")
    pixels = picture.modality.encode(given["picture"])[0].double()
    with torch.no_grad():
        state = picture.open(read(words, given["words"].long()))
        first, state = picture(pixels[:, :4], state)
        rest, state = picture(pixels[:, 4:11], state)
        spans, layout = module.encode({"words": given["words"], "picture": given["picture"]}, None, [["words", "picture"]] * batch)  # fmt: skip
        cut = spans.slice(0, 7 + 11)
        whole, after = module(cut, None, None if layout is None else layout.slice(0, 18))
    torch.testing.assert_close(torch.cat([first, rest], 1).flatten(0, 1), whole["picture"][0])
    torch.testing.assert_close(state["last"], after["last"])
    torch.testing.assert_close(state["passed"], after["passed"])
    torch.testing.assert_close(state["tails"], after["tails"], check_dtype=False)
    with pytest.raises(ValueError, match="full rows, without lengths"):
        words(given["words"].long(), None, Layout(lengths=torch.full((batch,), 3)))
