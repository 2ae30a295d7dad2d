"""``mmlong save``: a run that was trained here, as a folder that is loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml
from safetensors.torch import save_file

import mmlong as package
from mmlong.training.checkpoints import newest_whole, read_checkpoint

Call = Callable[..., tuple[int, str]]


def test_a_run_is_saved_with_its_averaged_weights_and_a_card(mmlong: Call, recipe: str) -> None:
    status, said = mmlong("fit", "-c", recipe, "--trainer.max_steps=4")
    assert status == 0, said
    (run,) = Path("runs/noise").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert Path(summary["data"].pop("name")).name == "noise"
    assert summary["data"] == {
        "source": "random pixels",
        "licence": "none needed",
        "classes": ["a", "b", "c"],
    }
    status, said = mmlong("save", "noise", "kept", "--license", "mit")
    assert status == 0, said
    assert f"of {run}" in said
    assert "in kept: README.md, config.json, model.safetensors" in said
    # The recipe averages weights: those are what evaluation and generation use, and they are not the last step's.
    model = package.load("kept")
    newest, _ = newest_whole(run / "checkpoints")
    assert newest is not None
    checkpoint = read_checkpoint(newest)
    state = model.state_dict()
    averaged = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
    assert all(state[key].equal(value) for key, value in averaged.items())
    assert any(not state[key.removeprefix("model.")].equal(value)
               for key, value in checkpoint["current_model_state"].items() if key.startswith("model."))  # fmt: skip
    assert package.load("noise").state_dict().keys() == state.keys()
    card = (Path("kept") / "README.md").read_text()
    assert yaml.safe_load(card[4:].partition("---")[0])["license"] == "mit"
    for line in (
        "# noise", "- dataset: noise", "- from: random pixels", "- licence of the data: none needed", f"- command: `{summary['command']}`",
        "- steps: 4", "- seed: 3", f"| accuracy | {summary['test/accuracy']} |", f"- commit of mmlong: {summary['commit'] or 'unknown'}",
        f"- processor: {summary['machine']['processor']}", f"- parameters: {sum(p.numel() for p in model.parameters()):,}",
    ):  # fmt: skip
        assert line in card.splitlines(), line
    # A saved folder again: the weights, and no run to write of.
    status, said = mmlong("save", "kept", "again")
    assert status == 0, said
    assert all(value.equal(state[key]) for key, value in package.load("again").state_dict().items())
    assert "## Training" not in (Path("again") / "README.md").read_text()


def test_what_cannot_be_saved(mmlong: Call, tmp_path: Path) -> None:
    model = package.create_model("pixel_sequence", size=[4, 4], dim=8, depth=1, mixers=["s4d"])
    model.save_pretrained(tmp_path / "a")
    status, said = mmlong("save", str(tmp_path / "a"), str(tmp_path / "a" / ".." / "a"))
    assert status == 2
    assert "where the model lies already" in said
    status, said = mmlong("save", str(tmp_path / "nowhere"), str(tmp_path / "b"))
    assert status == 1
    assert "no such folder, and no finished run" in said
    assert not (tmp_path / "b").exists()
    state = model.state_dict()
    state.pop("head.linear.bias")
    save_file(state, tmp_path / "a" / "model.safetensors")
    status, said = mmlong("save", str(tmp_path / "a"), str(tmp_path / "b"))
    assert status == 1
    assert "head.linear.bias is missing; expected (10,) float32" in said
    assert "Traceback" not in said
