"""``mmlong generate`` and ``mmlong score`` on small models of every modality, and what they say when something is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmlong.cli import main
from mmlong.models import build_model, save_model

MODALITIES: dict[str, dict[str, Any]] = {
    "text": {"name": "text"},
    "genome": {"name": "genome"},
    "mulaw": {"name": "mulaw", "rate": 8000},
    "audio": {"name": "audio", "rate": 8000},
    "stereo": {"name": "mulaw", "rate": 8000, "channels": 2},
    "image": {"name": "image", "size": [4, 6], "channels": 3, "order": "raster"},
    "bytes": {"name": "image_bytes", "size": [4, 6], "channels": 1, "order": "raster"},
}


def save(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    model = build_model(
        {"kind": "autoregressive", "modality": MODALITIES[name], "backbone": {"dim": 16, "depth": 1}, "head": {}}
    )
    save_model(model, folder / name)
    return folder / name


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("text", ["samples-0.txt", "samples-1.txt"]),
        ("genome", ["samples.fa"]),
        ("mulaw", ["samples-0.wav", "samples-1.wav"]),
        ("audio", ["samples-0.wav", "samples-1.wav"]),
        ("stereo", ["samples-0.wav", "samples-1.wav"]),
        ("image", ["samples.png"]),
        ("bytes", ["samples.png"]),
    ],
)
def test_every_modality_makes_its_files(
    name: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, name)
    length = [] if name in ("image", "bytes") else ["--length", 90]
    status, out, err = run(capsys, "generate", folder, "--count", 2, "--out", tmp_path / "a", *length)
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == files
    assert all(file in out for file in files)
    run(capsys, "generate", folder, "--count", 2, "--out", tmp_path / "b", *length)
    run(capsys, "generate", folder, "--count", 2, "--seed", 1, "--out", tmp_path / "c", *length)
    for file in files:
        first = (tmp_path / "a" / file).read_bytes()
        assert (tmp_path / "b" / file).read_bytes() == first
        assert (tmp_path / "c" / file).read_bytes() != first
    if name in ("mulaw", "audio", "stereo"):
        data, rate = soundfile.read(tmp_path / "a" / files[0], always_2d=True)
        assert (rate, data.shape) == (8000, (45, 2) if name == "stereo" else (90, 1))
    # What was made can be read back, and scored.
    if name not in ("image", "bytes"):
        status, out, err = run(capsys, "score", folder, *(tmp_path / "a" / file for file in files), "--segment", 13)
        assert status == 0, err
        assert "180 in all" in out
        assert "together" in out


def test_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = save(tmp_path, "text")
    out = tmp_path / "out"
    assert run(capsys, "generate", text, "--prompt", "def ", "--length", 5, "--out", out)[0] == 0
    made = (out / "samples-0.txt").read_bytes()
    assert made.startswith(b"def ")
    assert len(made) == 9
    status, shown, _ = run(capsys, "generate", text, "--prompt", "ab", "--length", 3, "--stream", "--temperature", 0)
    assert status == 0
    assert shown.encode("utf-8", "surrogateescape").startswith(b"ab")

    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(picture).save(tmp_path / "p.png")
    image = save(tmp_path, "image")
    assert run(capsys, "generate", image, "--prompt_file", tmp_path / "p.png", "--out", out)[0] == 0
    found = np.asarray(Image.open(out / "samples.png"))
    assert np.array_equal(found[:2], picture[:2])
    assert not np.array_equal(found[2:], picture[2:])

    (tmp_path / "g.fa").write_text(">one\nACGTACGTAC\n>two\nTTTTT\n")
    genome = save(tmp_path, "genome")
    prompt = ["--prompt_file", tmp_path / "g.fa", "--prompt_length", 6]
    assert run(capsys, "generate", genome, *prompt, "--length", 4, "--out", out)[0] == 0
    assert (out / "samples.fa").read_text().splitlines()[1].startswith("ACGTAC")

    soundfile.write(tmp_path / "s.wav", np.linspace(-0.5, 0.5, 50), 8000, subtype="PCM_16")
    sound = save(tmp_path, "audio")
    assert run(capsys, "generate", sound, "--prompt_file", tmp_path / "s.wav", "--length", 10, "--out", out)[0] == 0
    heard, _ = soundfile.read(out / "samples-0.wav")
    assert len(heard) == 60
    np.testing.assert_allclose(heard[:50], np.linspace(-0.5, 0.5, 50), atol=1e-4)


def test_score_is_the_same_in_any_segments_and_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path, "text")
    data = bytes(range(256)) * 3
    (tmp_path / "x.bin").write_bytes(data)
    from mmlong.models import load_model

    model = load_model(folder).eval()
    tokens = torch.tensor(list(data))[None]
    with torch.no_grad():
        nats = -model(tokens)[0].log_softmax(-1).gather(-1, tokens[..., None]).sum()
    wanted = float(nats) / math.log(2) / len(data)
    for segment in (16384, 100):
        _, out, _ = run(capsys, "score", folder, tmp_path / "x.bin", "--segment", segment)
        assert float(out.split()[0]) == pytest.approx(wanted, abs=2e-4)
    (tmp_path / "g.fa").write_text(">one\nACGT\n>two\nTTTTT\n")
    _, out, _ = run(capsys, "score", save(tmp_path, "genome"), tmp_path / "g.fa")
    assert [line.split(": ")[-1] for line in out.splitlines()[:2]] == [f"{tmp_path}/g.fa one", f"{tmp_path}/g.fa two"]
    assert "9 in all" in out.splitlines()[2]


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, image, sound = (save(tmp_path, name) for name in ("text", "image", "audio"))
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    (tmp_path / "junk.png").write_bytes(b"no picture")
    (tmp_path / "empty.txt").write_bytes(b"")
    soundfile.write(tmp_path / "fast.wav", np.zeros(50), 44100, subtype="PCM_16")
    plain = tmp_path / "plain"
    modality = {"name": "image", "size": [4, 4]}
    save_model(
        build_model(
            {"modality": modality, "backbone": {"dim": 8, "depth": 1}, "head": {"name": "classify", "num_classes": 2}}
        ),
        plain,
    )
    for arguments, message in (
        (("generate", "text/nothing"), "no such folder, and no finished run"),
        (("generate", tmp_path), "holds no saved model"),
        (("generate", plain), "kind 'plain', which has no next token"),
        (("generate", text, "--prompt", ""), "--prompt is empty"),
        (("generate", text, "--temperature", -1), "temperature is -1.0"),
        (("generate", text, "--top_p", 3), "top_p is 3.0"),
        (("generate", text, "--count", 0), "at least 1"),
        (("generate", text, "--prompt_file", tmp_path / "gone.txt"), "gone.txt: is missing"),
        (("generate", text, "--prompt_file", tmp_path / "small.png", "--prompt_length", 10**6), "asks for 1,000,000"),
        (("generate", image, "--prompt", "x"), "give a --prompt_file"),
        (("generate", image, "--length", 3), "a picture has 24 tokens"),
        (("generate", image, "--top_k", 3), "temperature only"),
        (("generate", image, "--stream"), "--stream writes texts"),
        (("generate", image, "--prompt_file", tmp_path / "small.png"), "is 5x5; this model reads 6x4"),
        (("score", image, tmp_path / "junk.png"), "is no image"),
        (("score", text, tmp_path / "empty.txt"), "is empty"),
        (("score", sound, tmp_path / "fast.wav"), "44,100 Hz and 8,000 Hz is due"),
        (("score", text, tmp_path / "small.png", "--segment", 0), "--segment is at least 1"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status in (1, 2), arguments
        assert message in err, (arguments, err)
        assert len(err.strip().splitlines()) <= 2
