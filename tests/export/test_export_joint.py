"""Exported joint models against the model they came from: likelihoods and greedy spans behind spans of another modality, in other sizes than were traced; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmlong.export import Bounds, ExportError, JointGenerator, export_model, load
from mmlong.export.joint_programs import joint_programs
from mmlong.export.programs import Size
from mmlong.generation import generate_spans
from mmlong.heads import GREEDY
from mmlong.models import JointModel, build_model

SIZE = [3, 4]
CONFIG: dict[str, Any] = {
    "kind": "joint",
    "modalities": {"picture": {"name": "image_bytes", "size": SIZE, "order": "raster"}, "words": {"name": "text"}},
    "backbone": {"dim": 8, "depth": 1, "mixers": ["attention"], "ffn": "none"},
}


def joint(**changes: Any) -> JointModel:
    torch.manual_seed(0)
    model = build_model({**CONFIG, **changes})
    assert isinstance(model, JointModel)
    with torch.no_grad():  # what comes before must tell
        for voice in model.voices.values():
            voice.head.linear.weight.mul_(20)
            voice.start.mul_(30)
    return model.eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def speaks_as(model: JointModel, exported: JointGenerator, batch: int) -> None:
    """A row of a picture and words, read in pieces and token by token across the border, against the model's own forward of the whole row."""
    draw = torch.Generator().manual_seed(batch)
    pictures = torch.randint(256, (batch, 1, *SIZE), dtype=torch.uint8, generator=draw)
    words = torch.randint(256, (batch, 9), dtype=torch.uint8, generator=draw)
    for order in (["picture", "words"], ["words", "picture"]):
        spans, layout = model.encode({"picture": pictures, "words": words}, None, [order] * batch)
        whole = model(spans, None, layout)[0]
        state = exported.begin(batch)
        for name, raw in (("picture", pictures), ("words", words)) if order[0] == "picture" else (("words", words), ("picture", pictures)):  # fmt: skip
            tokens = exported.encode(name, raw)
            assert torch.equal(tokens, model.voices[name].modality.encode(raw)[0])
            assert torch.equal(exported.decode(name, tokens), raw)
            state = exported.open(state)
            said = []
            for start, stop in ((0, 4), (4, 5), (5, 6), (6, tokens.shape[1])):
                part, state = exported.read(name, tokens[:, start:stop], state)
                said.append(part)
            close(torch.cat(said, 1).flatten(0, 1), whole[name][0])
    for order, given in ((["picture", "words"], "picture"), (["words", "picture"], "words")):
        tokens = exported.encode(given, pictures if given == "picture" else words)
        lengths = {"words": 6}
        made = exported.generate(order, lengths, {given: tokens})
        wanted = generate_spans(model, order, lengths, {given: tokens}, sampling=GREEDY)
        assert made.keys() == wanted.keys()
        for name in order:
            assert torch.equal(made[name], wanted[name]), name
    nothing = exported.generate(["words"], {"words": 5}, batch=batch)["words"]
    assert torch.equal(nothing, generate_spans(model, ["words"], {"words": 5}, batch=batch, sampling=GREEDY)["words"])


NUMBERS: dict[str, Any] = {
    "modalities": {
        **CONFIG["modalities"],
        "picture": {"name": "image", "size": SIZE, "channels": 1, "order": "raster"},
    },
    "linear_prediction": {"picture": [1, 4]},
}


@pytest.mark.parametrize("changes", [{}, {"backbone": {**CONFIG["backbone"], "mixers": ["mamba2"]}}, NUMBERS], ids=["attention", "mamba2", "numbers"])  # fmt: skip
@torch.no_grad()
def test_programs_do_what_the_joint_model_does(changes: dict[str, Any]) -> None:
    """Before they are traced: what each computes, in several sizes and behind a past, against the model's own forward of spans."""
    model = joint(**changes).requires_grad_(False)
    programs, begin = joint_programs(model, Bounds(2, 64), GREEDY)
    assert [one.name for one in programs[:6]] == [f"picture.{what}" for what in ("read", "peek", "put", "encode", "decode", "sample")]  # fmt: skip
    assert all(t.numel() > 0 for t in begin.values())
    for program in programs:
        for size in (Size(1, 2, 0), Size(3, 5, 4)):
            given = program.example(size)
            found, wanted = program.module(*given), program.reference(*given)
            found, wanted = ((t,) if isinstance(t, torch.Tensor) else t for t in (found, wanted))
            assert len(found) == len(wanted) == len(program.outputs)
            assert len(given) == len(program.inputs)
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.slow
def test_spans_go_on_in_another_modality(tmp_path: Path) -> None:
    model = joint()
    info = export_model(model, tmp_path / "out", sampling=GREEDY)
    exported = load(tmp_path / "out")
    assert isinstance(exported, JointGenerator)
    assert list(info["modalities"]) == exported.names == ["picture", "words"]
    assert info["modalities"]["picture"]["tokens_per_sample"] == 12
    assert info["programs"]["words.read"]["bounds"]["length"][0] == 2
    for batch in (1, 3):
        speaks_as(model, exported, batch)
    with pytest.raises(ValueError, match="has no 'word'; it has picture, words"):
        exported.generate(["word"], {})
    with pytest.raises(ValueError, match=r"how many tokens of words to draw is not said: lengths\['words'\]"):
        exported.generate(["words"], {})
    with pytest.raises(ValueError, match="words is given, and the order has only picture"):
        exported.generate(["picture"], {}, {"words": torch.zeros(1, 3, dtype=torch.int64)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": {**CONFIG["backbone"], "mixers": ["mamba2"]}},
        {"backbone": {**CONFIG["backbone"], "mixers": [{"name": "local", "window": 4}]}},
        NUMBERS,
    ],
    ids=["mamba2", "local", "numbers"],
)  # fmt: skip
def test_other_states(changes: dict[str, Any], tmp_path: Path) -> None:
    model = joint(**changes)
    export_model(model, tmp_path / "out", sampling=GREEDY)
    exported = load(tmp_path / "out")
    assert isinstance(exported, JointGenerator)
    speaks_as(model, exported, 3)


def test_what_is_not_exported_is_told(tmp_path: Path) -> None:
    both = {**CONFIG["backbone"], "direction": "both"}
    masked = build_model({**CONFIG, "kind": "joint_masked", "backbone": both})
    with pytest.raises(ExportError, match="a masked joint model is not exported: where the tokens"):
        export_model(masked, tmp_path / "out")
    towers = build_model({**CONFIG, "kind": "towers", "heads": {}})
    with pytest.raises(ExportError, match="towers have a program for each modality"):
        export_model(towers, tmp_path / "out")
    with pytest.raises(ValueError, match="has no embedding"):
        export_model(joint(), tmp_path / "out", embedding=True)
    assert not (tmp_path / "out").exists()
