"""Loading says which tensor is wrong, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlong.models import build_model, load_model, save_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = {
        "modality": {"name": "image", "size": [8, 8]},
        "backbone": {"dim": 16, "depth": 2, "mixers": ["s4d"], "direction": "both"},
        "head": {"name": "classify", "num_classes": 3},
    }
    save_model(build_model(config), tmp_path)
    return tmp_path


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Weights with some replaced, added or (``None``) left out; dots are written as two underscores."""
    found = load_file(folder / "model.safetensors")
    for key, value in tensors.items():
        key = key.replace("__", ".")
        found.pop(key, None)
        if value is not None:
            found[key] = value
    save_file(found, folder / "model.safetensors")


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load_model(folder)
    return str(caught.value)


def test_missing_other_and_unexpected_tensors_are_named(saved: Path) -> None:
    change(saved, head__linear__weight=None, head__linear__bias=torch.zeros(4), head__extra=torch.zeros(2, 5))
    said = refused(saved)
    assert "another architecture" in said
    assert "head.linear.weight is missing; expected (3, 16) float32" in said
    assert "head.linear.bias is (4,) float32; expected (3,) float32" in said
    assert "head.extra (2, 5) float32 is not in the model" in said
    assert "more" not in said


def test_integers_in_place_of_numbers_are_refused_and_other_floats_are_converted(saved: Path) -> None:
    bias = load_file(saved / "model.safetensors")["head.linear.bias"]
    change(saved, head__linear__bias=bias.bfloat16())
    loaded = load_model(saved).head.linear.bias
    assert loaded.dtype == torch.float32
    assert loaded.equal(bias.bfloat16().float())
    change(saved, head__linear__bias=torch.zeros(3, dtype=torch.int64))
    assert "head.linear.bias is (3,) int64; expected (3,) float32" in refused(saved)


def test_of_many_wrong_tensors_five_are_named_and_the_others_counted(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["backbone"]["dim"] = 24
    (saved / "config.json").write_text(json.dumps(config))
    lines = refused(saved).splitlines()
    assert len(lines) == 7
    assert sum("expected" in line for line in lines) == 5
    wrong = sum(value.shape != build_model(config).state_dict()[key].shape
                for key, value in load_file(saved / "model.safetensors").items())  # fmt: skip
    assert lines[-1].strip() == f"and {wrong - 5} more"


@pytest.mark.parametrize("share", [0.001, 0.01, 0.7, 0.999])
def test_a_truncated_file_says_what_it_lacks(saved: Path, share: float) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    kept = int(share * len(data))
    path.write_bytes(data[:kept])
    said = refused(saved)
    assert "damaged" in said
    if 8 <= kept < 8 + header:
        assert f"ends inside its header, after {kept:,} of at least {8 + header:,} bytes" in said
    elif kept >= 8 + header:
        offsets = {
            key: entry["data_offsets"][1] for key, entry in json.loads(data[8 : 8 + header]).items() if "dtype" in entry
        }
        cut = sorted((key for key, end in offsets.items() if 8 + header + end > kept), key=lambda key: offsets[key])
        assert f"ends after {kept:,} of {len(data):,} bytes" in said
        assert f"{cut[0]} is cut off; expected {tuple(load_shape(saved, cut[0]))} float32" in said
        assert ("more" in said) == (len(cut) > 5)


def load_shape(folder: Path, key: str) -> torch.Size:
    return build_model(json.loads((folder / "config.json").read_text())).state_dict()[key].shape


def test_a_file_of_something_else(saved: Path) -> None:
    for data in (b"", b"\0" * 100, b"\x80\x02}q\x00."):
        (saved / "model.safetensors").write_bytes(data)
        assert "damaged" in refused(saved)


def test_a_configuration_that_names_what_there_is_not(saved: Path) -> None:
    path = saved / "config.json"
    good = json.loads(path.read_text())

    def with_backbone(**options: object) -> str:
        return json.dumps({**good, "backbone": {**good["backbone"], **options}})

    for text, wanted in (
        (with_backbone(mixers=["mamba3000"]), "unknown mixer 'mamba3000' (did you mean 'mamba"),
        (with_backbone(mixers=[{"name": "s4d", "d_stat": 8}]), "has no option 'd_stat' (did you mean 'd_state'?)"),
        (with_backbone(depht=2), "did you mean 'depth'?"),
        (json.dumps({**good, "head": {"name": "clasify", "num_classes": 3}}), "did you mean 'classify'?"),
        (json.dumps({**good, "kind": "plane"}), "did you mean 'plain'?"),
        ("[1, 2]", "holds list"),
        ("{", "config.json is no JSON"),
    ):
        path.write_text(text)
        said = refused(saved)
        assert wanted in said, said
        assert "'\"" not in said, "not the quotes of a KeyError"
