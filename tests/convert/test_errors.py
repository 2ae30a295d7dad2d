"""What ``mmlong convert`` and the converters say when something is wrong, on published folders that are made without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlong.cli import main
from mmlong.convert import CONVERTERS, ConvertError, Published, convert
from mmlong.convert.folder import hollow
from mmlong.convert.table import TRANSPOSED, Row, their_shapes, to_ours, to_theirs
from mmlong.models import build_model, load_model, save_model

CONFIG = {
    "model_type": "gpt2", "vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 19, "activation_function": "gelu_new",
}  # fmt: skip

Change = Callable[[dict[str, Tensor]], Any]


def tensors_of(config: dict[str, Any], kind: str = "plain") -> dict[str, Tensor]:
    """Tensors of the names and shapes that belong to a configuration."""
    converter, p = CONVERTERS[config["model_type"]], Published(config)
    shapes = {name: tuple(t.shape) for name, t in hollow(converter.config(p, kind)).state_dict().items()}
    r = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=r) for name, s in their_shapes(list(converter.rows(p)), shapes).items()}


def folder(at: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    at.mkdir()
    whole = {**CONFIG, **config}
    (at / "config.json").write_text(json.dumps(whole))
    save_file(tensors_of(CONFIG) if tensors is None else tensors, at / "model.safetensors")
    return at


def test_a_row_is_read_both_ways() -> None:
    rows = [Row("a", ("x", "y"), TRANSPOSED), Row(("b", "c"), "z", axis=-1)]
    theirs = {"a": torch.randn(3, 5), "b": torch.randn(2, 4), "c": torch.randn(2, 4)}
    shapes = {"x": (1, 3), "y": (4, 3), "z": (2, 8)}
    ours = to_ours(rows, theirs, shapes)
    assert {name: tuple(t.shape) for name, t in ours.items()} == shapes
    assert torch.equal(ours["y"], theirs["a"].T[1:])
    assert torch.equal(ours["z"][:, 4:], theirs["c"])
    again = to_theirs(rows, ours)
    assert all(torch.equal(again[name], t) for name, t in theirs.items())
    assert their_shapes(rows, shapes) == {"a": (3, 5), "b": (2, 4), "c": (2, 4)}


def without(name: str) -> Change:
    return lambda t: t.pop(f"transformer.{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("h.0.ln_1.bias"), r"transformer\.h\.0\.ln_1\.bias is missing, of shape \(8,\)"),
        (
            lambda t: t.update({"transformer.h.1.ln_1.bias": torch.zeros(8)}),
            r"transformer\.h\.1\.ln_1\.bias is not part of such a model, of shape \(8,\) \(did you mean 'transformer\.h\.0\.ln_1\.bias'\?\)",
        ),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.zeros(17, 8)}),
            r"transformer\.wpe\.weight is \(17, 8\), and by config\.json it is \(16, 8\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(20, 8)}),
            r"lm_head\.weight and transformer\.wte\.weight differ",
        ),
    ],
    ids=["missing", "unknown", "misshapen", "untied"],
)
def test_tensors_that_do_not_fit_are_named(change: Change, message: str, tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    change(tensors)
    with pytest.raises(ConvertError, match=message):
        convert(folder(tmp_path / "theirs", tensors), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True, and only False can be converted",
        ),
        ({"activation_function": "mish"}, "activation_function is 'mish'; activations that can be converted: gelu"),
        ({"model_type": "gpt3"}, r"model_type 'gpt3' are not converted \(did you mean 'gpt2'\?\)"),
        ({"model_type": None}, "no model_type"),
        ({"n_head": 3}, "does not divide into 3 heads"),
    ],
    ids=["form", "activation", "type", "none", "sizes"],
)
def test_configurations_that_ours_has_no_form_for(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(folder(tmp_path / "theirs", **config), tmp_path / "ours")


def test_a_configuration_that_lacks_a_size(tmp_path: Path) -> None:
    at = folder(tmp_path / "theirs")
    (at / "config.json").write_text(json.dumps({key: value for key, value in CONFIG.items() if key != "n_layer"}))
    with pytest.raises(ConvertError, match="config.json lacks 'n_layer'"):
        convert(at, tmp_path / "ours")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    at = folder(tmp_path / "theirs")
    (at / "model.safetensors").rename(at / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin, a pickle.*save_pretrained\(safe_serialization=True\)"):
        convert(at, tmp_path / "ours")
    (at / "pytorch_model.bin").unlink()
    with pytest.raises(ConvertError, match=r"has no model\.safetensors"):
        convert(at, tmp_path / "ours")
    (at / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConvertError, match=r"model\.safetensors is damaged"):
        convert(at, tmp_path / "ours")


def test_several_files_with_an_index(tmp_path: Path) -> None:
    at, tensors = folder(tmp_path / "theirs"), tensors_of(CONFIG)
    (at / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + (i % 2)}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, at / file)
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    convert(at, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(tmp_path / "back" / "model.safetensors").items())
    (at / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"model-2-of-2\.safetensors is missing"):
        convert(at, tmp_path / "again")
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ConvertError, match="names no files of its folder"):
        convert(at, tmp_path / "again")


def test_older_files_without_a_prefix_with_masks_and_a_second_head(tmp_path: Path) -> None:
    """As the first GPT-2 was published; all of it comes back."""
    tensors = {name.removeprefix("transformer."): t for name, t in tensors_of(CONFIG).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "lm_head.weight": tensors["wte.weight"].clone()}
    convert(folder(tmp_path / "theirs", tensors), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], t) for name, t in tensors.items())


def test_a_model_without_its_head(tmp_path: Path) -> None:
    tensors = {name.removeprefix("transformer."): t for name, t in tensors_of(CONFIG).items()}
    with pytest.raises(ConvertError, match=r"lm_head\.weight is missing, .*no name begins with 'transformer\.'"):
        convert(folder(tmp_path / "theirs", tensors, tie_word_embeddings=False), tmp_path / "ours")


def test_half_precision_is_kept(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in tensors_of(CONFIG).items()}
    convert(folder(tmp_path / "theirs", tensors), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(again[name].dtype == torch.bfloat16 and torch.equal(again[name], t) for name, t in tensors.items())


def test_what_goes_back(tmp_path: Path) -> None:
    """A model that was trained on goes back by what its forebear came from; another one does not."""
    convert(folder(tmp_path / "theirs"), tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    save_model(model, tmp_path / "tuned")
    with pytest.raises(ConvertError, match=r"has no published\.json"):
        convert(tmp_path / "tuned", tmp_path / "back")
    convert(tmp_path / "tuned", tmp_path / "back", like=tmp_path / "ours")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(again[name], t + 1) for name, t in tensors_of(CONFIG).items())
    other = build_model({**model.config, "backbone": {**model.config["backbone"], "norm": "rms"}})
    save_model(other, tmp_path / "other")
    with pytest.raises(
        ConvertError, match=r"no longer what its published\.json says.*: backbone\.norm in config\.json"
    ):
        convert(tmp_path / "other", tmp_path / "no", like=tmp_path / "ours")
    with pytest.raises(ConvertError, match="goes back by what it came from alone"):
        convert(tmp_path / "ours", tmp_path / "no", kind="plain")
    with pytest.raises(ConvertError, match="is for a model of ours that goes back"):
        convert(tmp_path / "theirs", tmp_path / "no", like=tmp_path / "ours")


def test_kinds_and_options(tmp_path: Path) -> None:
    at = folder(tmp_path / "theirs", bos_token_id=None)
    convert(at, tmp_path / "ours")
    assert load_model(tmp_path / "ours").config["kind"] == "plain"
    with pytest.raises(ConvertError, match=r"bos_token_id is None, .* \(--kind plain\)"):
        convert(at, tmp_path / "no", kind="autoregressive")
    with pytest.raises(ConvertError, match="to models of kind autoregressive, plain, not 'masked'"):
        convert(at, tmp_path / "no", kind="masked")
    with pytest.raises(TypeError, match="GPT-2 has no option 'globals'"):
        convert(at, tmp_path / "no", globals=1)
    with pytest.raises(ConvertError, match="exists already"):
        convert(at, tmp_path / "ours")
    with pytest.raises(ConvertError, match="is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "no")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    status, out, _ = run("convert", "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(CONVERTERS.names())
    at, ours = folder(tmp_path / "theirs"), tmp_path / "ours"
    status, out, err = run("convert", at, ours)
    assert (status, out) == (0, f"GPT-2, autoregressive: 1,176 numbers in {ours}\n"), err
    status, out, err = run("generate", ours, "--prompt", "3 1 4", "--length", 6, "--temperature", 0)
    assert status == 0, err
    codes = (ours / "generated" / "samples-0.txt").read_text().split()
    assert codes[:3] == ["3", "1", "4"]
    assert len(codes) == 9
    (tmp_path / "codes.txt").write_text("3 1 4 1 5\n9 2\n")
    status, out, err = run("score", ours, tmp_path / "codes.txt")
    assert status == 0, err
    assert "bits a token, 7 in all" in out
    status, out, err = run("generate", ours, "--prompt", "The dog", "--length", 2)
    assert status == 1
    assert "'The' is no code: this model reads whole numbers" in err
    status, out, err = run("generate", ours, "--length", 40)
    assert status == 1
    assert "has learned 16 places" in err
    status, out, err = run("convert", ours, tmp_path / "back")
    assert (status, out) == (0, f"GPT-2: 16 tensors in {tmp_path / 'back'}\n"), err
    status, out, err = run("convert", at)
    assert status == 2
    assert "give the folder to convert and a new one" in err
    status, out, err = run("convert", at, ours)
    assert status == 1
    assert "exists already" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_blocks": 2}, "num_blocks is 2, and only 1 can be converted: each layer on the latents"),
        ({"architectures": ["PerceiverForImageClassificationLearned"]}, "only PerceiverForMaskedLM can be converted"),
        ({"v_channels": 24}, "v_channels is 24 and d_latents 40"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', and only 'gelu'"),
    ],
    ids=["shared", "images", "values", "activation"],
)
def test_perceivers_of_another_form(more: dict[str, Any], message: str) -> None:
    sizes = {"d_latents": 40, "d_model": 32, "max_position_embeddings": 64, "num_latents": 6, "vocab_size": 50}
    with pytest.raises(ConvertError, match=message):
        CONVERTERS["perceiver"].config(Published({**sizes, "qk_channels": 16, "v_channels": 40, **more}), "plain")
