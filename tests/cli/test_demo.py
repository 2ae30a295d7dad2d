"""What ``mmlong demo`` does, without its page; the page itself where gradio is installed."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from mmlong.datamodules.errors import DataError
from PIL import Image

from mmlong.cli.trying import as_picture, as_sound, as_text, class_names, go_on, predict_file, predicts, prompt_tokens
from mmlong.generation import generate, stream
from mmlong.heads import Sampling
from mmlong.models import AutoregressiveModel, build_model, save_model

BACKBONE = {"dim": 8, "depth": 1, "mixers": ["s4d"]}


def model_of(modality: dict[str, Any], head: dict[str, Any] | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    backbone = {**BACKBONE, "direction": "causal"} if head is None else BACKBONE
    kind = {"kind": "autoregressive"} if head is None else {}
    return build_model(
        {**kind, "modality": modality, "backbone": backbone, **({} if head is None else {"head": head}), **more}
    ).eval()


@pytest.fixture
def writer() -> AutoregressiveModel:
    return model_of({"name": "text"})


def test_a_file_is_told_apart(tmp_path: Path) -> None:
    model = model_of({"name": "image", "size": [8, 8], "channels": 1}, {"name": "classify", "num_classes": 3})
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    said = predict_file(model, tmp_path / "a.png", ["x", "y", "z"])
    expected = model(*(lambda t, layout: (t, None, layout))(*model.encode(torch.from_numpy(pixels)[None, None])))[0]
    assert list(said.values) == ["x", "y", "z"]
    assert list(said.values.values()) == pytest.approx(expected.softmax(-1)[0].tolist(), abs=1e-6)
    assert (said.chances, said.tokens, said.cut) == (True, 64, False)
    Image.fromarray(pixels[:4]).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="is 8x4; this model reads 8x8"):
        predict_file(model, tmp_path / "small.png", ["x", "y", "z"])
    with pytest.raises(DataError, match="is missing"):
        predict_file(model, tmp_path / "none.png", ["x", "y", "z"])


def test_labels_numbers_and_long_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(bytes(range(97, 123)) * 2000)
    labels = model_of({"name": "text"}, {"name": "multilabel", "num_classes": 2})
    said = predict_file(labels, tmp_path / "t.txt", ["a", "b"], most=40_000)
    assert (said.tokens, said.cut) == (40_000, True)
    assert all(0 < v < 1 for v in said.values.values())
    numbers = predict_file(model_of({"name": "text"}, {"name": "regress", "num_classes": 1}), tmp_path / "t.txt", ["v"])
    assert (numbers.chances, numbers.tokens, numbers.cut) == (False, 52_000, False)
    tagger = model_of({"name": "text"}, {"name": "tag", "num_classes": 2})
    assert not predicts(tagger)
    with pytest.raises(ValueError, match="head 'tag' says nothing of a file as a whole"):
        predict_file(tagger, tmp_path / "t.txt", ["a", "b"])


def test_names_of_classes() -> None:
    model = model_of({"name": "text"}, {"name": "classify", "num_classes": 2})
    assert class_names(model) == ["0", "1"]
    model.class_names = ["a", "b"]
    assert class_names(model) == ["a", "b"]
    model.class_names = ["a", "b", "c"]  # of other data
    assert class_names(model) == ["0", "1"]


def test_a_stream_is_what_generate_makes_and_leaves_the_caller_alone(writer: AutoregressiveModel) -> None:
    prompt = prompt_tokens(writer, "ab")
    whole = generate(writer, 20, prompt, generator=torch.Generator().manual_seed(3))
    writer.train()
    tokens = []
    for token in stream(writer, 20, prompt, generator=torch.Generator().manual_seed(3)):
        assert not torch.is_inference_mode_enabled()
        assert writer.training
        tokens.append(token)
    assert torch.equal(torch.cat([prompt, *tokens], 1), whole)
    with pytest.raises(ValueError, match="length is -1"):
        stream(writer, -1)


def test_a_text_grows_as_it_is_drawn(writer: AutoregressiveModel) -> None:
    prompt = prompt_tokens(writer, "héllo")
    assert prompt is not None
    pieces = [raw.clone() for raw in go_on(writer, prompt, 20, Sampling(0.5), seed=4, every=8)]
    assert [p.shape[1] for p in pieces] == [6 + 8, 6 + 16, 6 + 20]
    assert all(as_text(p).startswith("héllo") for p in pieces)
    assert torch.equal(pieces[2][:, :14], pieces[0])
    again = list(go_on(writer, prompt, 20, Sampling(0.5), seed=4, every=100))
    assert torch.equal(again[0], pieces[2])
    assert prompt_tokens(writer, "") is None
    assert next(go_on(writer, None, 3, every=1)).shape[1] == 1
    with pytest.raises(ValueError, match="there is nothing to draw: length 0"):
        go_on(writer, prompt, 0)


def test_a_picture_fills_and_a_sound_goes_on(tmp_path: Path) -> None:
    painter = model_of({"name": "image_bytes", "size": [4, 4], "channels": 1})
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "a.png")
    half = prompt_tokens(painter, path=tmp_path / "a.png")
    assert half is not None
    assert half.shape[1] == 8
    pictures = [as_picture(raw) for raw in go_on(painter, half, 100, every=4)]
    assert [p.shape for p in pictures] == [(4, 4)] * 2
    assert (pictures[0][:2] == 200).all()
    assert (pictures[0][3] == 0).all()
    player = model_of({"name": "mulaw", "rate": 8000})
    soundfile.write(tmp_path / "a.wav", np.zeros(50), 8000)
    (sound,) = [as_sound(raw) for raw in go_on(player, prompt_tokens(player, path=tmp_path / "a.wav"), 30, every=99)]
    assert sound.shape == (80,)
    assert sound.dtype == np.int16


def test_without_gradio_the_extra_is_named(
    mmlong: Callable[..., tuple[int, str]], tmp_path: Path, writer: AutoregressiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(writer, tmp_path / "saved")
    real = builtins.__import__

    def refused(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refused)
    status, said = mmlong("demo", str(tmp_path / "saved"))
    assert status == 1
    assert "demo needs gradio, not installed (No module named 'gradio'): pip install 'mmlong[demo]'" in said
    status, said = mmlong("demo", "nothing")
    assert "nothing: no such folder" in said
