"""Exported programs against the model they came from: every modality, other sizes than the traced ones, padded rows, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone.ngrams import NGrams
from mmlong.export import Bounds, ExportError, Generator, Predictor, export_model, load
from mmlong.export import folder as exporting
from mmlong.generation import generate
from mmlong.heads import GREEDY
from mmlong.mixers import Traits
from mmlong.mixers.attention import Attention
from mmlong.models import AutoregressiveModel, Model, build_model

MODALITIES: dict[str, dict[str, Any]] = {
    "text": {"name": "text"},
    "genome": {"name": "genome"},
    "audio": {"name": "audio", "rate": 8000},
    "stereo": {"name": "mulaw", "rate": 8000, "channels": 2},
    "image": {"name": "image", "size": [4, 6], "channels": 3, "order": "raster"},
    "palette": {"name": "image_palette", "size": [3, 4], "palette": [[0, 0, 0], [9, 200, 30], [255, 255, 255]]},
}
CONV = {"name": "masked_conv2d", "width": 6, "radius": 1}
slow = pytest.mark.slow


def build(modality: str, mixers: list[Any], head: dict[str, Any] | None = None, **more: Any) -> Model:
    torch.manual_seed(0)
    backbone = {"dim": 8, "depth": 1, "mixers": mixers, "ffn": "none", **more.pop("backbone", {})}
    config = {"modality": MODALITIES[modality], "backbone": backbone, "head": head or {}, **more}
    return build_model(config).eval()


def classifier(modality: str, mixer: Any, **more: Any) -> Model:
    return build(modality, [mixer], {"name": "classify", "num_classes": 3}, **more)


def generator(modality: str, mixer: Any, **more: Any) -> AutoregressiveModel:
    model = build(modality, [mixer], None, kind="autoregressive", **more)
    assert isinstance(model, AutoregressiveModel)
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def raw_of(model: Model, batch: int, length: int, seed: int = 3) -> tuple[Tensor, Tensor | None]:
    raw, lengths, _ = model.modality.example(batch, length, torch.Generator().manual_seed(seed))
    return raw, lengths


@torch.no_grad()
def predicts_as(model: Model, folder: Path, sizes: list[tuple[int, int]]) -> None:
    predictor = load(folder)
    assert isinstance(predictor, Predictor)
    for batch, length in sizes:
        raw, lengths = raw_of(model, batch, length)
        tokens, layout = model.encode(raw, lengths)
        close(predictor(raw, lengths), model(tokens, None, layout)[0])
        if lengths is not None:
            close(predictor(raw), model(*_plain(model, raw))[0])  # no lengths: full rows


def _plain(model: Model, raw: Tensor) -> tuple[Tensor, None, None]:
    return model.encode(raw)[0], None, None


@torch.no_grad()
def generates_as(model: AutoregressiveModel, folder: Path, batch: int, length: int) -> None:
    """The exported generator against the model's own calls: likelihoods of a whole sequence, states token by token, and greedy tokens."""
    exported = load(folder)
    assert isinstance(exported, Generator)
    raw = raw_of(model, batch, length, seed=5)[0]
    tokens = model.encode(raw)[0]
    assert torch.equal(exported.encode(raw), tokens)
    decoded = exported.decode(tokens)
    torch.testing.assert_close(decoded, model.modality.decode(tokens), rtol=0, atol=0)
    whole = model(tokens)[0]
    first, state = exported.begin(batch)
    close(first, whole[:, :1])
    # Read some, then go on one by one; what is said of each next token is what the model says of it in the whole sequence.
    cut = tokens.shape[1] // 2
    said, state = exported.read(tokens[:, :cut], state)
    close(said, whole[:, 1 : cut + 1])
    for t in range(cut, min(cut + 4, tokens.shape[1] - 1)):
        said, state = exported.step(tokens[:, t : t + 1], state)
        close(said, whole[:, t + 1 : t + 2])
    count = 6
    greedy = exported.generate(count, prompt=tokens[:, :cut])
    assert torch.equal(greedy, generate(model, count, tokens[:, :cut], sampling=GREEDY))


# One classifier and one generator of each modality


@pytest.mark.parametrize(
    ("modality", "mixer"),
    [
        ("genome", {"name": "local", "window": 5}),
        ("audio", "s4d"),
    ],
)
@slow
def test_classifiers_of_sequences(modality: str, mixer: Any, tmp_path: Path) -> None:
    model = classifier(modality, mixer, backbone={"direction": "both"})
    info = export_model(model, tmp_path / "out", class_names=["a", "b", "c"])
    predicts_as(model, tmp_path / "out", [(1, 2), (3, 37), (2, 700)])
    assert load(tmp_path / "out").class_names == ["a", "b", "c"]
    assert [port["shape"] for port in info["programs"]["predict"]["inputs"]][1] == ["batch"]
    assert info["programs"]["predict"]["outputs"][0]["shape"] == ["batch", 3]


@slow
def test_classifiers_of_images(tmp_path: Path) -> None:
    model = classifier("image", "mamba2", backbone={"direction": "alternate"})
    info = export_model(model, tmp_path / "out")
    predicts_as(model, tmp_path / "out", [(1, 1), (5, 1)])
    assert info["programs"]["predict"]["inputs"][0]["shape"] == ["batch", *model.modality.image]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("modality", "mixer", "more"),
    [
        ("text", "attention", {}),
        pytest.param("genome", "mamba2", {}, marks=slow),
        pytest.param("audio", CONV, {"linear_prediction": [1, 2]}, marks=slow),
        pytest.param("stereo", {"name": "local", "window": 4}, {}, marks=slow),
        pytest.param("image", CONV, {"linear_prediction": [1, 6]}, marks=slow),
        pytest.param("palette", "attention", {}, marks=slow),
    ],
)
def test_generators(modality: str, mixer: Any, more: dict[str, Any], tmp_path: Path) -> None:
    model = generator(modality, mixer, **more)
    export_model(model, tmp_path / "out", sampling=GREEDY)
    generates_as(model, tmp_path / "out", 3, 40)


# Other models, other outputs


@slow
def test_pooled_tags_with_a_pyramid_and_both_strands(tmp_path: Path) -> None:
    """Predictions at every position, and an embedding of a backbone that pools and sees both strands."""
    model = build("genome", ["attention"], {"name": "tag", "num_classes": 4}, backbone={"direction": "both"})
    info = export_model(model, tmp_path / "tag")
    predicts_as(model, tmp_path / "tag", [(2, 50)])
    assert info["programs"]["predict"]["outputs"][0]["shape"] == ["batch", "length", 4]
    backbone = {"dim": [8, 16], "depth": [1, 1], "pool": [4], "direction": "both", "reverse_complement": True}
    model = build("genome", ["attention"], {"name": "both_strands", "num_classes": 3}, backbone=backbone)
    info = export_model(model, tmp_path / "strands", embedding=True)
    raw, lengths = raw_of(model, 3, 61)
    tokens, layout = model.encode(raw, lengths)
    with torch.no_grad():
        x, _ = model.forward_features(tokens, None, layout)
        expected = model.forward_head(x, model.backbone.layout_out(layout, 61), pre_logits=True)
    predictor = load(tmp_path / "strands")
    assert isinstance(predictor, Predictor)
    close(predictor(raw, lengths), expected)
    assert info["programs"]["predict"]["outputs"][0] == {"name": "embedding", "dtype": "float32", "shape": ["batch", 8]}


@slow
def test_masked_models_are_told_what_is_hidden(tmp_path: Path) -> None:
    for modality in ("genome", "image"):
        model = build(modality, ["attention"], None, kind="masked", backbone={"direction": "both"})
        export_model(model, tmp_path / modality)
        predictor = load(tmp_path / modality)
        assert isinstance(predictor, Predictor)
        raw, lengths = raw_of(model, 3, 30)
        tokens, layout = model.encode(raw, lengths)
        hidden = torch.rand(tokens.shape[:2]) < 0.4
        with torch.no_grad():
            expected = model(tokens, None, layout, hidden)[0]
            assert not torch.allclose(expected, model(tokens, None, layout, ~hidden)[0])
        close(predictor(raw, lengths, hidden), expected)
        with pytest.raises(ValueError, match="needs hidden"):
            predictor(raw, lengths)


def test_a_head_that_is_only_there_for_training_is_left_out(tmp_path: Path) -> None:
    model = build("image", ["attention"], {"name": "project", "num_classes": 5}, backbone={"direction": "both"})
    info = export_model(model, tmp_path / "out", batch=Bounds(2, 2))
    assert info["programs"]["predict"]["outputs"] == [{"name": "embedding", "dtype": "float32", "shape": [2, 8]}]
    with pytest.raises(ValueError, match=r"raw of predict is \(2, 3, 4, 6\)"):
        load(tmp_path / "out")(raw_of(model, 3, 1)[0])  # type: ignore[operator]


@slow
def test_draws_are_the_head_s_own(tmp_path: Path) -> None:
    model = generator("audio", CONV)
    export_model(model, tmp_path / "out", length=Bounds(2, 64))
    exported = load(tmp_path / "out")
    assert isinstance(exported, Generator)
    prediction = exported.begin(4)[0]
    torch.manual_seed(11)
    expected = model.head.sample(prediction)
    torch.manual_seed(11)
    close(exported.sample(prediction), expected)
    torch.manual_seed(12)
    assert not torch.equal(exported.sample(prediction), expected)
    assert exported.decode(exported.generate(9, batch=2)).shape == (2, 9)


# Without this library

PLAIN = """
import sys
sys.modules["mmlong"] = None
import json, safetensors.torch, torch
folder = sys.argv[1]
info = json.load(open(f"{folder}/export.json"))
read, step, encode = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("read", "step", "encode"))
begin = safetensors.torch.load_file(f"{folder}/begin.safetensors")
prediction, state = begin["prediction"], [begin[name] for name in info["programs"]["step"]["names"][1:]]
(tokens,) = encode(torch.tensor([list(b"def main")], dtype=torch.uint8))
with torch.no_grad():
    prediction, *state = read(tokens, *state)
    found = []
    for _ in range(5):
        token = prediction[:, -1:].argmax(-1)
        found.append(int(token))
        prediction, *state = step(token, *state)
print(json.dumps(found))
"""


@slow
def test_plain_torch_runs_it(tmp_path: Path) -> None:
    model = generator("text", CONV)
    export_model(model, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    prompt = torch.tensor([list(b"def main")])
    expected = generate(model, 5, prompt, sampling=GREEDY)[0, 8:].tolist()
    assert json.loads(done.stdout) == expected


# Refusals


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    folder = tmp_path_factory.mktemp("exported") / "out"
    model = classifier("text", "attention", backbone={"direction": "both"})
    export_model(model, folder, batch=Bounds(1, 8), length=Bounds(4, 100))
    return model, folder


def test_classifiers_of_texts(exported: tuple[Model, Path]) -> None:
    model, folder = exported
    predicts_as(model, folder, [(1, 4), (3, 37), (8, 100)])
    predict = load(folder).info["programs"]["predict"]
    assert [port["shape"] for port in predict["inputs"]] == [["batch", "length"], ["batch"]]
    assert predict["bounds"] == {"batch": [1, 8], "length": [4, 100]}


def test_inputs_are_checked(exported: tuple[Model, Path]) -> None:
    predictor = load(exported[1])
    assert isinstance(predictor, Predictor)
    raw = torch.zeros(2, 20, dtype=torch.uint8)
    assert predictor(raw).shape == (2, 3)
    assert predictor(raw, torch.tensor([0, 20])).isfinite().all()
    with pytest.raises(TypeError, match="raw of predict is uint8"):
        predictor(raw.long())
    with pytest.raises(ValueError, match="for length 4 to 100, got 101"):
        predictor(torch.zeros(2, 101, dtype=torch.uint8))
    with pytest.raises(ValueError, match="for batch 1 to 8, got 9"):
        predictor(torch.zeros(9, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"raw of predict is \(batch, length\)"):
        predictor(raw[0])
    with pytest.raises(ValueError, match=r"lengths must be 0 .. 20"):
        predictor(raw, torch.tensor([3, 21]))
    with pytest.raises(ValueError, match="lengths of predict has batch 3"):
        predictor(raw, torch.tensor([3, 2, 1]))
    with pytest.raises(ValueError, match="takes no hidden"):
        predictor(raw, hidden=raw > 0)


def test_other_files_and_torn_ones_are_refused(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, folder = exported
    with pytest.raises(ExportError, match=r"export\.json is missing"):
        load(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    whole = (copy / "predict.pt2").read_bytes()
    (copy / "predict.pt2").write_bytes(whole[:-9])
    with pytest.raises(ExportError, match="SHA-256 differs"):
        load(copy)
    (copy / "predict.pt2").unlink()
    with pytest.raises(ExportError, match="no such file"):
        load(copy)
    (copy / "export.json").write_text("{")
    with pytest.raises(ExportError, match="damaged"):
        load(copy)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="has other files in it"):
        export_model(model, tmp_path / "full")


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def rewrite(path: Path, change: dict[str, bytes]) -> None:
    """A zip with members replaced or added, by their names below its top folder."""
    with zipfile.ZipFile(path) as archive:
        top = archive.namelist()[0].partition("/")[0]
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {f"{top}/{name}": data for name, data in change.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("where", ["sample inputs", "constant", "old format"])
def test_nothing_is_unpickled(where: str, exported: tuple[Model, Path], tmp_path: Path) -> None:
    from mmlong.export.formats import load_program

    path, trap = tmp_path / "predict.pt2", tmp_path / "sprung"
    path.write_bytes((exported[1] / "predict.pt2").read_bytes())
    bomb = pickle.dumps(Trap(trap))
    if where == "sample inputs":
        torch.save(Trap(trap), tmp_path / "bomb")
        rewrite(path, {"data/sample_inputs/model.pt": (tmp_path / "bomb").read_bytes()})
    elif where == "constant":
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
        config = json.dumps({"config": {"bomb": entry}}).encode()
        rewrite(path, {"data/constants/opaque_obj_0": bomb, "data/constants/model_constants_config.json": config})
    else:
        rewrite(path, {"serialized_state_dict.pt": bomb})
    with pytest.raises(ExportError, match="export the model anew"):
        load_program(path, "torch", ["raw", "lengths"])
    assert not trap.exists()


def test_a_wrong_program_is_not_left_behind(
    exported: tuple[Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not compute what the model does gets no folder, and an earlier export stays."""

    class Off(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *given: Tensor) -> Tensor:
            return self.inner(*given) + 0.01

    right = exporting.predict_program

    def wrong(*args: Any) -> Any:
        program = right(*args)
        program.module = Off(program.module)
        return program

    monkeypatch.setattr(exporting, "predict_program", wrong)
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text("{}")
    with pytest.raises(ExportError, match=r"not what the model computes.*prediction differs by 0\.01"):
        export_model(exported[0], out, batch=Bounds(2, 2), length=Bounds(9, 9))
    assert list(tmp_path.iterdir()) == [out]
    assert [path.name for path in out.iterdir()] == ["export.json"]


def test_what_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = generator("text", "attention")
    with pytest.raises(ValueError, match="no embedding"):
        export_model(model, tmp_path / "out", embedding=True)
    with pytest.raises(ValueError, match="nothing to draw"):
        export_model(classifier("text", "attention"), tmp_path / "out", sampling=GREEDY)
    with pytest.raises(ValueError, match="at least 2"):
        export_model(model, tmp_path / "out", length=Bounds(1, 9))
    with pytest.raises(ExportError, match="unknown format 'torchscript'"):
        export_model(model, tmp_path / "out", "torchscript")
    monkeypatch.setattr(Attention, "traits", Traits(paper="", padding=False))
    with pytest.raises(ValueError, match="Attention does not honour lengths"):
        export_model(model, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(
        Attention, "mix", lambda self, x, state, layout: (x * float(x.sum()), None)
    )  # looks at the data
    with pytest.raises(ExportError, match="predict cannot be traced by torch.export: "):
        export_model(classifier("text", "attention"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    for least, most in ((0, 3), (4, 2)):
        with pytest.raises(ValueError, match="bounds are two numbers"):
            Bounds(least, most)


# Other formats


def test_a_missing_compiler_or_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("text", "attention")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match=r"no compiler 'no-such-compiler' here: install one, name one in CXX"):
        export_model(model, tmp_path / "out", "aot")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"needs .*onnxscript.*pip install 'mmlong\[onnx\]'"):
        export_model(model, tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_any_number_are_one_program(tmp_path: Path) -> None:
    model = build("text", [CONV], {"name": "classify", "num_classes": 3})
    export_model(model, tmp_path / "out")
    predicts_as(model, tmp_path / "out", [(1, 2), (2, 6), (3, 37)])


def with_tables(model: Any) -> Any:
    """A model whose n-grams say something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NGrams):
                module.tables.normal_()
    return model


def test_n_grams_are_looked_up_in_a_program(tmp_path: Path) -> None:
    backbone = {"front": [{"ngrams": [1, 3], "rows": 40, "width": 5}]}
    model = with_tables(generator("text", "attention", backbone=backbone))
    export_model(model, tmp_path / "generator", sampling=GREEDY)
    generates_as(model, tmp_path / "generator", 3, 40)
    model = with_tables(classifier("text", "s4d", backbone=backbone))
    export_model(model, tmp_path / "classifier")
    predicts_as(model, tmp_path / "classifier", [(1, 2), (3, 37)])


@slow
def test_a_package_that_is_compiled(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    model = build("text", [CONV], {"name": "classify", "num_classes": 3})
    info = export_model(model, tmp_path / "out", "aot")
    assert info["programs"]["predict"]["format"] == "aot"
    predicts_as(model, tmp_path / "out", [(1, 2), (3, 37)])


@slow
def test_onnx(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = classifier("text", "attention", backbone={"direction": "both"})
    info = export_model(model, tmp_path / "out", "onnx")
    assert info["programs"]["predict"]["file"] == "predict.onnx"
    predicts_as(model, tmp_path / "out", [(1, 2), (3, 37)])
