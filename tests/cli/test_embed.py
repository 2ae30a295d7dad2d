"""``mmlong embed`` on files: rows in order, with names, equal to the model's own; and what it says when something is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmlong.cli import main
from mmlong.models import Model, build_model, save_model


def make(folder: Path, modality: dict[str, Any], head: dict[str, Any], **more: Any) -> Model:
    torch.manual_seed(0)
    backbone = {"dim": 8, "depth": 1, "mixers": ["s4d"], "direction": more.pop("direction", "both")}
    model = build_model({"modality": modality, "backbone": backbone, "head": head, **more}).eval()
    save_model(model, folder)
    return model


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Model, list[Path]]:
    model = make(tmp_path / "run", {"name": "image", "size": [4, 6]}, {"name": "classify", "num_classes": 2})
    paths = []
    for number in (2, 0, 1):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 6), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return model, paths


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    status = main(["embed", *(str(word) for word in words)])
    said = capsys.readouterr()
    return status, said.out + said.err


def due(model: Model, paths: list[Path]) -> np.ndarray:
    raw = torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in paths])
    tokens, layout = model.encode(raw)
    with torch.no_grad():
        x, _ = model.forward_features(tokens, None, layout)
        return model.forward_head(x, layout, pre_logits=True).numpy()


def test_a_row_a_file_in_their_order(
    pictures: tuple[Model, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, paths = pictures
    status, said = call(capsys, tmp_path / "run", *paths, "--out", tmp_path / "new" / "features.npz")
    assert status == 0, said
    assert "3 rows of 8 numbers by" in said
    found = np.load(tmp_path / "new" / "features.npz", allow_pickle=False)
    assert found["features"].dtype == np.float32
    np.testing.assert_allclose(found["features"], due(model, paths), rtol=1e-5, atol=1e-6)
    assert found["files"].tolist() == [str(path) for path in paths]
    assert found["names"].tolist() == ["2.png", "0.png", "1.png"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["features.npz"]


def test_a_vector_a_token(
    pictures: tuple[Model, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, paths = pictures
    status, said = call(capsys, tmp_path / "run", *paths, "--tokens", "--out", tmp_path / "tokens.npz")
    assert status == 0, said
    found = np.load(tmp_path / "tokens.npz", allow_pickle=False)
    assert sorted(found.files) == ["features_0", "features_1", "features_2", "files", "names"]
    rows = np.stack([found[f"features_{number}"] for number in range(3)])
    assert rows.shape == (3, 4, 6, 8)
    np.testing.assert_allclose(rows.mean((1, 2)), due(model, paths), rtol=1e-4, atol=1e-6)


def test_a_row_a_record_of_fasta_and_texts_of_any_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "dna", {"name": "genome"}, {"name": "classify", "num_classes": 2})
    (tmp_path / "a.fa").write_text(">one\nACGTACGTTT\n>two\nGGG\n")
    (tmp_path / "b.fa").write_text(">three\nACGTACGTTT\n")
    out = tmp_path / "dna.npz"
    status, said = call(capsys, tmp_path / "dna", tmp_path / "a.fa", tmp_path / "b.fa", "--out", out)
    assert status == 0, said
    found = np.load(out)
    assert found["names"].tolist() == ["one", "two", "three"]
    assert [Path(file).name for file in found["files"]] == ["a.fa", "a.fa", "b.fa"]
    np.testing.assert_array_equal(found["features"][0], found["features"][2])
    assert not np.allclose(found["features"][0], found["features"][1])

    make(tmp_path / "text", {"name": "text"}, {}, kind="autoregressive", direction="causal")
    (tmp_path / "long.txt").write_bytes(bytes(range(256)) * 200)
    words = (tmp_path / "text", tmp_path / "long.txt", "--out", out)
    status, said = call(capsys, *words)
    assert status == 1
    assert "head 'categorical' predicts every token and pools nothing" in said
    rows = []
    for segment in (10_000, 100_000):
        status, said = call(capsys, *words, "--pool", "mean", "--segment", segment)
        assert status == 0, said
        rows.append(np.load(out)["features"])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4, atol=1e-5)


def test_parquet_without_pyarrow_names_the_extra(
    pictures: tuple[Model, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, said = call(capsys, tmp_path / "run", pictures[1][0], "--out", tmp_path / "f.parquet")
    assert status == 1
    assert "pip install 'mmlong[parquet]'" in said
    assert not (tmp_path / "f.parquet").exists()


def test_parquet(pictures: tuple[Model, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    model, paths = pictures
    status, said = call(capsys, tmp_path / "run", *paths, "--out", tmp_path / "f.parquet")
    assert status == 0, said
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["name"] == ["2.png", "0.png", "1.png"]
    assert table["file"] == [str(path) for path in paths]
    np.testing.assert_allclose(np.array(table["features"]), due(model, paths), rtol=1e-5, atol=1e-6)


def test_what_is_wrong(pictures: tuple[Model, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, paths = pictures
    run, out = tmp_path / "run", tmp_path / "f.npz"
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "other.png")
    for words, status, wanted in (
        ((run, paths[0], "--out", tmp_path / "f.csv"), 2, "name it .npz or .parquet"),
        ((run, paths[0], "--tokens", "--pool", "mean", "--out", out), 2, "--tokens are not pooled"),
        ((run, paths[0], "--tokens", "--out", tmp_path / "f.parquet"), 2, "lie in a .npz file"),
        ((run, paths[0], "--pool", "sum", "--out", out), 1, "it can be mean, last, max"),
        ((run, paths[0], tmp_path / "other.png", "--out", out), 1, "other.png: is 5x5; this model reads 6x4"),
        ((run, tmp_path / "none.png", "--out", out), 1, "is missing"),
        ((tmp_path / "nowhere", paths[0], "--out", out), 2, "no such folder"),
    ):
        found, said = call(capsys, *words)
        assert found == status, said
        assert wanted in said, said
        assert not out.exists()
        assert not list(tmp_path.glob("*.partial"))
