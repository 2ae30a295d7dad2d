"""Runs from the command line to the run folder: whole, interrupted, resumed, and going wrong."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmlong.datamodules.packed import PackedDataset
from safetensors.torch import load_file

import mmlong as package
from mmlong.tasks import ClassifyTask
from mmlong.training.metrics_csv import read_metrics

Call = Callable[..., tuple[int, str]]
LEFT = {"config.yaml", "config.json", "model.safetensors", "metrics.csv", "summary.json", "checkpoints", "loss.png",
        "confusion.png", "predictions.png"}  # fmt: skip


def run_folder() -> Path:
    (found,) = Path("runs/noise").iterdir()
    return found


def test_a_run_and_what_it_leaves(mmlong: Call, recipe: str) -> None:
    status, said = mmlong("fit", "-c", recipe, "--trainer.max_steps=6", "--model.backbone.mixers=[mamba2]")
    assert status == 0, said
    assert "256 tokens a sample" in said
    assert "6 steps of 8 samples" in said
    assert "expected time" in said
    assert "noise: test accuracy 0." in said
    run = run_folder()
    assert {path.name for path in run.iterdir()} >= LEFT
    assert "mamba2" in (run / "config.yaml").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["tokens_per_second"] > 0
    assert f"test accuracy {summary['test/accuracy']:.4f}" in said
    steps = [int(row["step"]) for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
    assert steps == list(range(6))
    model = package.load_model(run)
    assert model.config["backbone"]["mixers"] == ["mamba2"]

    status, said = mmlong("predict", "-c", recipe, "--ckpt_path", str(run), "--model.backbone.mixers=[mamba2]")
    assert status == 0, said
    with open(run / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    tested = torch.tensor([row["truth"] == row["prediction"] for row in rows]).float().mean()
    assert summary["test/accuracy"] == pytest.approx(float(tested), abs=1e-6)
    assert sorted(int(row["index"]) for row in rows) == list(range(len(rows)))
    assert {row["truth"] for row in rows} <= {"a", "b", "c"}

    # Without -c the run's own configuration is used, command-line changes of then included.
    status, said = mmlong("test", "--ckpt_path", str(run))
    assert status == 0, said
    assert f"test accuracy {summary['test/accuracy']:.4f}" in said
    status, said = mmlong("validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"))
    assert status == 0, said
    assert "val accuracy" in said


def interrupting(monkeypatch: pytest.MonkeyPatch, where: str, at: int) -> None:
    """Send SIGINT at the ``at``-th call of a step method."""
    method: Any = getattr(ClassifyTask, where)
    calls = 0

    def step(self: ClassifyTask, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGINT)
        return method(self, batch, batch_idx)

    monkeypatch.setattr(ClassifyTask, where, step)


@pytest.fixture
def undisturbed(mmlong: Call, recipe: str) -> dict[str, torch.Tensor]:
    status, said = mmlong("fit", "-c", recipe, "--run_dir", "whole")
    assert status == 0, said
    return load_file("whole/model.safetensors")


@pytest.mark.parametrize(("where", "at", "after"), [("training_step", 3, 3), ("validation_step", 2, 4)])
def test_ctrl_c_saves_says_how_to_go_on_and_the_weights_come_out_the_same(
    where: str, at: int, after: int, undisturbed: dict[str, torch.Tensor], mmlong: Call, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    handler = signal.getsignal(signal.SIGINT)  # ignored, not Python's own, where tests run in the background of a shell
    with monkeypatch.context() as patch:
        interrupting(patch, where, at)
        status, said = mmlong("fit", "-c", recipe)
    assert status == 130
    run = run_folder()
    assert f"stopped after step {after} and saved {run}/checkpoints/step={after}.ckpt" in said
    assert f"mmlong fit --ckpt_path {run}" in said
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(99)
    status, said = mmlong("fit", "-c", recipe, "--ckpt_path", "last")
    assert status == 0, said
    assert f"going on from {run}/checkpoints/step={after}.ckpt" in said
    found = load_file(run / "model.safetensors")
    for name, value in undisturbed.items():
        assert torch.equal(found[name], value), name
    whole, resumed = read_metrics(Path("whole/metrics.csv")), read_metrics(run / "metrics.csv")
    for key in ("train/loss", "train/learning_rate"):
        assert [row[key] for row in resumed if key in row] == [row[key] for row in whole if key in row]


def test_the_command_line_wins_over_the_checkpoint(mmlong: Call, recipe: str) -> None:
    assert mmlong("fit", "-c", recipe, "--trainer.max_steps=3")[0] == 0
    status, said = mmlong("fit", "-c", recipe, "--ckpt_path", "last", "--trainer.max_steps=5", "--model.optim.lr=0.5")
    assert status == 0, said
    run = run_folder()
    assert json.loads((run / "summary.json").read_text())["steps"] == 5
    assert "lr: 0.5" in (run / "config-from-step=3.yaml").read_text()
    assert len(list((run / "checkpoints").glob("step=*.ckpt"))) == 2


def test_a_finished_run_says_so(mmlong: Call, recipe: str) -> None:
    assert mmlong("fit", "-c", recipe, "--trainer.max_steps=2")[0] == 0
    status, said = mmlong("fit", "-c", recipe, "--ckpt_path", "last", "--trainer.max_steps=2")
    assert status == 0
    assert "has done its 2 steps" in said


def test_not_a_number_stops_the_run_and_keeps_what_was_good(
    mmlong: Call, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Any = ClassifyTask.training_step
    seen: list[list[int]] = []

    def step(self: ClassifyTask, batch: Any, batch_idx: int) -> Any:
        seen.append(batch["index"].tolist())
        loss = method(self, batch, batch_idx)
        return loss * float("nan") if len(seen) == 4 else loss

    monkeypatch.setattr(ClassifyTask, "training_step", step)
    status, said = mmlong("fit", "-c", recipe)
    assert status == 1
    assert f"the loss is nan in step 4 (samples {', '.join(map(str, seen[3]))})" in said
    last = run_folder() / "checkpoints" / "step=3.ckpt"
    assert f"The last good checkpoint is {last}" in said
    state = torch.load(last, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_another_architecture_is_refused_with_the_first_differences(mmlong: Call, recipe: str) -> None:
    assert mmlong("fit", "-c", recipe, "--trainer.max_steps=1")[0] == 0
    status, said = mmlong(
        "fit", "-c", recipe, "--ckpt_path=last", "--model.backbone.dim=16", "--model.backbone.mixers=[mamba2]"
    )
    assert status == 1
    assert "backbone.dim: 8 in the checkpoint, 16 here" in said
    assert "backbone.mixers: ['s4d'] in the checkpoint, ['mamba2'] here" in said


def test_a_pickle_that_would_run_code_is_no_checkpoint(mmlong: Call, recipe: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path("owned").touch, ())

    torch.save({"state_dict": Evil()}, "evil.ckpt")
    status, said = mmlong("test", "-c", recipe, "--ckpt_path", "evil.ckpt")
    assert status == 1
    assert "evil.ckpt" in said
    assert not Path("owned").exists()


def test_a_damaged_checkpoint_is_passed_over(mmlong: Call, recipe: str) -> None:
    assert mmlong("fit", "-c", recipe, "--trainer.max_steps=3")[0] == 0
    newest = run_folder() / "checkpoints" / "step=3.ckpt"
    newest.write_bytes(newest.read_bytes()[:2000])
    status, said = mmlong("test", "-c", recipe, "--ckpt_path=last")
    assert status == 0, said
    assert "step=3.ckpt is damaged" in said
    assert "from " + str(newest.with_name("step=2.ckpt")) in said


@pytest.mark.slow
def test_two_ranks_from_the_command_line(recipe: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mmlong", "fit", "-c", recipe,
         "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=3"],
        capture_output=True, text=True, env=environment, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    assert json.loads((run_folder() / "summary.json").read_text())["ranks"] == 2


def test_a_damaged_sample_stops_the_run_or_is_skipped_and_counted(
    mmlong: Call, recipe: str, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(packed, "damaged")
    split = PackedDataset("damaged").split("val")
    data = bytearray(split.shards[0].read_bytes())
    data[int(split.offset["png"][3]) + 5] ^= 1
    split.shards[0].write_bytes(data)
    name = f"{split.shards[0].name} [{split.keys[3]}.png]"
    status, said = mmlong("fit", "-c", recipe, "--data.dataset=damaged", "--run_dir=stopped")
    assert status == 1
    assert f"{name}: damaged: its checksum differs" in said
    status, said = mmlong("fit", "-c", recipe, "--data.dataset=damaged", "--data.on_bad=skip", "--run_dir=skipped")
    assert status == 0
    assert f"skipped a bad sample (1 so far): damaged/{name}: damaged" in caplog.text
    assert "skipped bad samples 2 times; the log names them" in said  # eight steps, evaluated twice
    assert json.loads(Path("skipped/summary.json").read_text())["skipped_samples"] == 2
