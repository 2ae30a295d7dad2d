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


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is there, so that fit would refuse to begin in it; the steps are those that it began with."""
    from mmlong.experiments import equal_minutes

    ran: list[list[str]] = []

    def killed(words: list[str], **_: Any) -> None:
        ran.append(words[3:])
        folder = Path(words[-1].partition("=")[2])
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("")
        if len(ran) > 1:
            torch.save({"state_dict": {}}, folder / "checkpoints" / "step=3.ckpt")
        if len(ran) > 2:
            summary = {"train_seconds": 100, "steps": 240, "train_cpu_seconds": 90.0}
            (folder / "summary.json").write_text(json.dumps(summary))
            return
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", killed)
    run = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            equal_minutes.fit(["text/bible_ar"], {}, 0.5, 2.0, 7, run)
    found = equal_minutes.fit(["text/bible_ar"], {}, 0.6, 2.0, 7, run)
    begun = ["fit", "-c", "text/bible_ar", "--trainer.max_steps=240", "--trainer.val_check_interval=240", "--seed_everything=7", f"--run_dir={run}"]  # fmt: skip
    assert ran == [begun, begun, ["fit", f"--ckpt_path={run}"]]
    assert (found.row["steps"], found.row["cpu_minutes"]) == (240, 1.5)
    assert equal_minutes.fit(["text/bible_ar"], {}, 0.6, 2.0, 7, run).row["cpu_minutes"] == 1.5
    assert len(ran) == 3


def test_a_step_is_timed() -> None:
    seconds, parameters = hierarchy.step_seconds(
        load_recipes(["audio/percussion"]),
        {"data.length": 256, "data.batch_size": 1, "model.backbone.dim": [32, 32, 32, 32]},
    )
    assert seconds > 0
    assert parameters > 1000
