"""kNN-LM against its formula written out; what a datastore holds, and which are refused; the command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.knn.knn_lm import Datastore, NearestNeighbours, build_datastore, interpolate, measure
from mmlong.models import AutoregressiveModel, build_model, load_model, save_model
from mmlong.retrieval.folder import BadFolderError

SIZES: dict[str, Any] = {"dim": 16, "depth": 2, "mixers": ["mamba2", {"name": "local", "window": 9}]}
Command = Callable[..., tuple[int, str]]


def tiny(**options: Any) -> AutoregressiveModel:
    torch.manual_seed(options.pop("seed", 0))
    config = {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {**SIZES, **options}, "head": {}}
    model = build_model(config).eval()
    assert isinstance(model, AutoregressiveModel)
    return model


def document(seed: int, length: int) -> Tensor:
    return torch.randint(97, 123, (1, length), generator=torch.Generator().manual_seed(seed))


def by_definition(
    model: AutoregressiveModel, store: list[Tensor], asked: Tensor, k: int, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """``log p`` of each token by the model, and by both."""
    with torch.no_grad():
        keys = torch.cat([model.forward_features(one)[0][0] for one in store])
        values = torch.cat([one[0] for one in store])
        features = model.forward_features(asked)[0][0]
        alone = model(asked)[0][0].softmax(-1)
    together = []
    for q, p, token in zip(features, alone, asked[0], strict=True):
        d = ((keys - q) ** 2).sum(-1)
        nearest = d.argsort()[:k]
        total = sum(math.exp(-float(d[n]) / temperature) for n in nearest)
        knn = sum(math.exp(-float(d[n]) / temperature) for n in nearest if values[n] == token) / total
        together.append(math.log2(weight * knn + (1 - weight) * float(p[token])))
    return alone.log2().gather(1, asked[0][:, None]).sum(), torch.tensor(together, dtype=torch.float64)


@pytest.mark.parametrize(
    ("k", "weight", "temperature"), [(7, 0.25, 1.0), (1000, 0.6, 3.0), (1, 0.1, 0.5), (7, 0.0, 1.0)]
)
@pytest.mark.parametrize("segment", [257, 10])
def test_is_its_formula(tmp_path: Path, k: int, weight: float, temperature: float, segment: int) -> None:
    model = tiny().double()
    store, asked = [document(1, 257), document(2, 63)], document(3, 63)
    count = build_datastore(model, store, tmp_path / "store", {}, dtype="float32", segment=segment)
    assert count == 320
    opened = Datastore(tmp_path / "store", model)
    assert opened.values.tolist() == torch.cat(store, 1)[0].tolist()
    neighbours = NearestNeighbours(opened, 256, k, temperature)
    found = measure(model, neighbours, [asked], [weight], segment=segment)
    alone, together = by_definition(model, store, asked, k, weight, temperature)
    assert found.tokens == 63
    assert found.alone == pytest.approx(-float(alone), rel=1e-6)
    assert found.together[0] == pytest.approx(-float(together.sum()), rel=1e-4)
    if weight == 0:
        assert found.together[0] == pytest.approx(found.alone, rel=1e-6)


def test_a_distribution() -> None:
    logits, knn = torch.randn(5, 7), torch.rand(5, 7)
    knn[:, 3] = 0
    knn = knn / knn.sum(-1, keepdim=True)
    for weight in (0.0, 0.25, 1.0):
        p = interpolate(logits, knn, weight).exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(5))
        torch.testing.assert_close(p, weight * knn + (1 - weight) * logits.softmax(-1))


def test_the_very_document_is_found_again(tmp_path: Path) -> None:
    """In float16 keys, too. And a document that has nothing to do with what is held costs no more than the weight: -log2(1 - l) bits a token."""
    model = tiny()
    build_datastore(model, [document(1, 200)], tmp_path / "store", {})
    neighbours = NearestNeighbours(Datastore(tmp_path / "store", model), 256, k=4, temperature=0.01)
    found = measure(model, neighbours, [document(1, 200)], [0.25, 0.9])
    assert found.together[0] / 200 < -math.log2(0.25) + 0.2 < found.alone / 200
    assert found.together[1] < found.together[0]
    other = measure(model, neighbours, [document(5, 100) - 90], [0.25])
    assert other.alone < other.together[0] <= other.alone - 100 * math.log2(0.75) + 1e-3


def test_limits_and_what_cannot_be_kept(tmp_path: Path) -> None:
    model = tiny()
    store = [document(1, 50), document(2, 50)]
    assert build_datastore(model, store, tmp_path / "a", {}, limit=70, segment=32) == 70
    opened = Datastore(tmp_path / "a", model)
    assert opened.values.tolist() == torch.cat(store, 1)[0, :70].tolist()
    assert measure(model, NearestNeighbours(opened, 256, 3), store, limit=60, segment=32).tokens == 60
    with torch.no_grad():
        model.backbone.norm.weight.fill_(1e5)
    with pytest.raises(ValueError, match="do not fit into float16 keys: take float32"):
        build_datastore(model, store, tmp_path / "b", {})
    with pytest.raises(ValueError, match="not one token"):
        build_datastore(model, [], tmp_path / "b", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    continuous = build_model(
        {"kind": "autoregressive", "modality": {"name": "audio", "rate": 8000}, "backbone": SIZES, "head": {}}
    )
    with pytest.raises(ValueError, match="head categorical"):
        build_datastore(continuous, store, tmp_path / "b", {})  # type: ignore[arg-type]
    for wrong in ({"k": 0}, {"temperature": 0.0}, {"search": "guess"}):
        with pytest.raises(ValueError, match="at least 1|positive|exact or faiss"):
            NearestNeighbours(opened, 256, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        measure(model, NearestNeighbours(opened, 256, 3), store, [1.5])


def test_another_models_is_refused(tmp_path: Path) -> None:
    model = tiny()
    build_datastore(model, [document(1, 50)], tmp_path / "store", {})
    other = tiny(seed=1)
    with pytest.raises(BadFolderError, match="another model") as refused:
        Datastore(tmp_path / "store", other)
    said = json.loads((tmp_path / "store" / "datastore.json").read_text())
    assert said["model"] in str(refused.value)
    assert str(refused.value).count("weights") == 1
    with pytest.raises(BadFolderError, match="its dim is 16, the model's 24"):
        Datastore(tmp_path / "store", tiny(dim=24))
    # Saved and loaded it is the same model; with one weight changed it is another.
    save_model(model, tmp_path / "run")
    same = load_model(tmp_path / "run").eval()
    assert len(Datastore(tmp_path / "store", same)) == 50  # type: ignore[arg-type]
    with torch.no_grad():
        next(same.backbone.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(BadFolderError, match="another model"):
        Datastore(tmp_path / "store", same)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [("metric", "dot", "has metric 'dot'"), ("version", 2, "of version 2"), ("codes", 9, "its codes is 9")],
)
def test_another_format_is_refused(tmp_path: Path, entry: str, value: Any, said: str) -> None:
    model = tiny()
    build_datastore(model, [document(1, 50)], tmp_path / "store", {})
    path = tmp_path / "store" / "datastore.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(BadFolderError, match=said):
        Datastore(tmp_path / "store", model)


def test_the_command(run: Path, tmp_path: Path, mmlong: Command) -> None:
    store = tmp_path / "store"
    status, said = mmlong("knn", "build", run, "--out", store)
    assert status == 0, said
    # All of training but the copy of a test document: 100 + 137 + 174 + 211.
    assert "1 documents left out" in said
    assert "622 tokens of train" in said
    status, said = mmlong("knn", "evaluate", run, store, "--k", 9, "--weight", 0.1, 0.5, "--split", "test")
    assert status == 0, said
    assert "291 tokens of test" in said
    assert said.count("bits a byte") == 3
    status, said = mmlong("knn", "evaluate", run, store, "--split", "train")
    assert status == 1
    assert "no result" in said
    status, said = mmlong("knn", "build", run, "--out", store)
    assert status == 1
    assert "there already" in said
    with open(store / "keys.bin", "r+b") as file:
        file.truncate(100)
    status, said = mmlong("knn", "evaluate", run, store)
    assert status == 1
    assert "cut short" in said


def test_the_command_says_what_is_wrong(run: Path, tmp_path: Path, mmlong: Command, monkeypatch: Any) -> None:
    assert mmlong("knn")[0] == 2
    assert "did you mean" in mmlong("knn", "bild")[1]
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "config.yaml").unlink()
    assert "has no config.yaml" in mmlong("knn", "build", bare, "--out", tmp_path / "store")[1]
    assert "has no split 'dev'" in mmlong("knn", "build", run, "--out", tmp_path / "store", "--split", "dev")[1]
    monkeypatch.setattr(
        "mmlong.retrieval.folder.FolderWriter.add",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    status, said = mmlong("knn", "build", run, "--out", tmp_path / "store")
    assert status == 1
    assert "No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_faiss_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    model = tiny()
    build_datastore(model, [document(1, 257)], tmp_path / "store", {})
    opened = Datastore(tmp_path / "store", model)
    bits = [
        measure(model, NearestNeighbours(opened, 256, 9, search=search), [document(3, 63)]).together[0]
        for search in ("exact", "faiss")
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
