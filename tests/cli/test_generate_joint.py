"""``mmlong generate --as NAME`` and ``mmlong score --as NAME`` of joint models: what is given is read, what is made is the greedy continuation, and errors are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmlong.cli import main
from mmlong.generation import generate_spans
from mmlong.heads import GREEDY
from mmlong.models import JointModel, build_model, save_model


def joint() -> JointModel:
    torch.manual_seed(0)
    model = build_model(
        {
            "kind": "joint",
            "modalities": {
                "picture": {"name": "image_bytes", "size": [4, 6], "order": "raster"},
                "sound": {"name": "mulaw", "rate": 8000},
                "words": {"name": "text"},
            },
            "backbone": {"dim": 16, "depth": 1},
        }
    )
    assert isinstance(model, JointModel)
    with torch.no_grad():  # what comes before must tell
        for voice in model.voices.values():
            voice.head.linear.weight.mul_(30)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(joint(), tmp_path / "joint")
    return tmp_path / "joint"


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out + err


def test_words_of_a_picture_and_a_sound(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sound = np.random.default_rng(1).integers(-9000, 9000, 40).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", sound, 8000)
    given = ["--given", f"picture={tmp_path / 'a.png'}", "--given", f"sound={tmp_path / 'a.wav'}"]
    greedy = ["--temperature", 0, "--length", 7, "--out", tmp_path / "out"]
    status, said = run(capsys, "generate", folder, "--as", "words", *given, *greedy, "--count", 2)
    assert status == 0, said
    assert "samples-1.txt" in said
    model = joint()
    tokens = {
        "picture": model.voices["picture"].modality.encode(torch.from_numpy(pixels)[None, None])[0],
        "sound": model.voices["sound"].modality.encode(torch.from_numpy(sound / 32768).float()[None])[0],
    }
    made = generate_spans(model, ["picture", "sound", "words"], {"words": 7}, tokens, sampling=GREEDY)["words"]
    assert (tmp_path / "out" / "samples-1.txt").read_bytes() == bytes(made[0].tolist())


def test_a_picture_of_words(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for words in ("seven", "eight"):
        out = tmp_path / words
        status, said = run(
            capsys, "generate", folder, "--as", "picture", "--given_text", f"words={words}", "--out", out
        )
        assert status == 0, said
        pictures.append(np.asarray(Image.open(out / "samples.png")))
    assert pictures[0].shape == (4, 6)
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to make, --as picture or sound or words"),
        (["--as", "word"], "speaking has 'word'"),
        (["--as", "words", "--given", "picture"], "'picture' is not NAME=FILE"),
        (["--as", "words", "--given_text", "sound=a"], "sound is audio: --given sound=FILE"),
        (["--as", "words", "--given", "sound=none.wav"], "none.wav"),
    ],
    ids=["what", "name", "form", "text", "file"],
)
def test_what_cannot_be_is_told(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = run(capsys, "generate", folder, *arguments)
    assert status == 1
    assert message in said


def test_a_model_of_one_modality_takes_none_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = build_model({"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 16, "depth": 1}})
    save_model(single, tmp_path / "text")
    status, said = run(capsys, "generate", tmp_path / "text", "--as", "text")
    assert status == 1
    assert "--as and --given are for joint models" in said


def test_score_is_of_a_span_behind_others(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bits of words behind a picture and a sound are those of the whole row."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sound = np.random.default_rng(1).integers(-9000, 9000, 40).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", sound, 8000)
    (tmp_path / "a.txt").write_text("seven eight")
    (tmp_path / "b.txt").write_text("nine")
    given = ["--given", f"picture={tmp_path / 'a.png'}", "--given", f"sound={tmp_path / 'a.wav'}"]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    model = joint().eval()
    found = {}
    for name, more in (("behind", given), ("alone", [])):
        status, said = run(capsys, "score", folder, "--as", "words", *more, *files, "--segment", 3)
        assert status == 0, said
        found[name] = [float(line.split()[0]) for line in said.splitlines()]
    raw = {"picture": torch.from_numpy(pixels)[None, None], "sound": torch.from_numpy(sound / 32768).float()[None]}
    totals = {"behind": 0.0, "alone": 0.0}
    for place, file in enumerate(files):
        words = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)[None]
        for name, others, order in (("behind", raw, ["picture", "sound", "words"]), ("alone", {}, ["words"])):
            spans, layout = model.encode({**others, "words": words}, None, [order])
            with torch.no_grad():
                prediction = model(spans, None, layout)[0]
            nats, count = model.losses(prediction, spans)["words"]
            bits = float(nats) / int(count) / np.log(2)
            totals[name] += bits * int(count)
            assert found[name][place] == pytest.approx(bits, abs=1e-3)
    assert found["behind"][0] != pytest.approx(found["alone"][0], abs=0.05)
    for name, total in totals.items():
        assert found[name][2] == pytest.approx(total / 15, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to score, --as picture or sound or words"),
        (["--as", "word"], "speaking has 'word'"),
        (["--as", "words", "--given", "sound=none.wav"], "none.wav"),
    ],
    ids=["what", "name", "file"],
)
def test_what_cannot_be_scored_is_told(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("abc")
    status, said = run(capsys, "score", folder, tmp_path / "a.txt", *arguments)
    assert status == 1
    assert message in said
