"""What a hierarchy buys: every form is a backbone that can do what its flat one does; the command trains what the minutes hold, and goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from mmlong.experiments.hierarchy import __main__ as hierarchy
from mmlong.experiments.hierarchy.subjects import SUBJECTS

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.cli.recipes import load_recipes

BACKBONE = "model.backbone."


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, s in SUBJECTS.items() for form in s.forms])
def test_every_form_is_a_backbone_like_the_flat_one(name: str, form: str) -> None:
    subject = SUBJECTS[name]
    config = load_recipes([subject.recipe])["model"]["init_args"]["backbone"]
    given = {key.removeprefix(BACKBONE): value for key, value in subject.forms[form].items()}
    assert all(key.startswith(BACKBONE) for key in subject.forms[form])
    made = Backbone(BackboneConfig(**{**config, **given}))
    assert made.causal == (config["direction"] == "causal")
    assert made.streaming == made.causal


def test_the_command_trains_what_the_minutes_hold_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], **_: Any) -> None:
        ran.append(words)
        folder = Path(words[-1].removeprefix("--run_dir="))
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"train_seconds": 100, "steps": 240, "test/accuracy": 0.75}))

    monkeypatch.setattr(hierarchy, "step_seconds", lambda recipe, options: (0.5, 1234))
    monkeypatch.setattr(hierarchy, "load_model", lambda run: torch.nn.Identity())
    monkeypatch.setattr(subprocess, "run", run)
    words = ["percussion", "--minutes", "2", "--seed", "7", "--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "f.json")]  # fmt: skip
    assert hierarchy.main([*words, "--forms", "flat"]) == 0
    assert len(ran) == 1
    assert {"--trainer.max_steps=240", "--seed_everything=7", "--data.length=44100", "--model.backbone.dim=64"} <= set(
        ran[0]
    )
    assert hierarchy.main([*words, "--markdown", str(tmp_path / "f.md")]) == 0
    assert len(ran) == 2  # the other form alone
    assert "--model.backbone.dim=64" not in ran[1]
    lines = (tmp_path / "f.md").read_text().splitlines()
    assert lines[2].split(" | ")[1:] == ["flat", "1,234", "240", "0.50", "test/accuracy 0.7500", " |"]
    with pytest.raises(SystemExit):
        hierarchy.main(["percussion", "--forms", "sphere"])


def test_a_step_is_timed() -> None:
    seconds, parameters = hierarchy.step_seconds(
        load_recipes(["audio/percussion"]),
        {"data.length": 256, "data.batch_size": 1, "model.backbone.dim": [32, 32, 32, 32]},
    )
    assert seconds > 0
    assert parameters > 1000
