"""``mmlong sweep``: every run once, failures kept with their reason, killed runs gone on with, wrong keys refused before anything is trained."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmlong.cli import main, trial
from mmlong.cli.trial import STOPPED, TrialFailedError, reason
from mmlong.tasks import ClassifyTask

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of every process that would have been started; each runs here instead."""
    words_of: list[list[str]] = []

    def run(given: list[str] | Callable[[], list[str]], log: Path, threads: int = 1) -> str:
        words = given() if callable(given) else given
        words_of.append(words)
        assert words[0] == "-m"
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(words[2:]) if words[1] == "mmlong" else trial.main(words[2:])
        os.environ.pop("MMLONG_RUN_DIR", None)
        if status in STOPPED:
            raise KeyboardInterrupt
        if status:
            raise TrialFailedError(reason(status, said.getvalue()))
        return said.getvalue()

    monkeypatch.setattr(trial, "run_logged", run)
    return words_of


def table(folder: str = "runs/sweep/noise") -> list[dict[str, Any]]:
    return list(json.loads(Path(folder, "sweep.json").read_text())["rows"])


def test_every_run_once_the_best_by_validation_and_the_failed_with_a_reason(
    mmlong: Call, recipe: str, ran: list[list[str]]
) -> None:
    words = ["sweep", "-c", recipe, "--grid", "model.backbone.mixers=[s4d],[hiena]", "--steps", "2", "--seeds", "0", "1", "--markdown", "t.md", "--data.batch_size=4"]  # fmt: skip
    status, said = mmlong(*words)
    assert status == 1, said
    assert len(ran) == 4
    found = table()
    assert [row["seed"] for row in found] == [0, 1, 0, 1]
    assert all("unknown mixer 'hiena'" in row["failed"] for row in found[2:])
    assert all(0 <= row["metrics"]["val/accuracy"] <= 1 and row["steps"] == 2 for row in found[:2])
    assert not any(name.startswith("test/") for row in found for name in row["metrics"])
    assert found[1]["command"][:4] == ["mmlong", "fit", "-c", recipe]
    assert "--seed_everything=1" in found[1]["command"]
    assert "best: mixers [s4d]: val/accuracy" in said
    assert f"train it with: mmlong fit -c {recipe} --data.batch_size=4 '--model.backbone.mixers=[s4d]'" in said
    assert Path("runs/sweep/noise/sweep.png").read_bytes().startswith(b"\x89PNG")
    lines = Path("t.md").read_text().splitlines()
    assert lines[0].startswith("| mixers | val/accuracy | seeds | steps |")
    assert lines[2].startswith("| [s4d] | 0.")
    assert "| failed | 0 |" in lines[3]

    assert mmlong(*words)[0] == 1
    assert len(ran) == 4  # nothing again
    assert mmlong(*words, "--retry")[0] == 1
    assert len(ran) == 6  # what failed
    assert table() == found


def test_minutes_are_steps_that_were_measured(
    mmlong: Call, recipe: str, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = 0.0

    def step_seconds(step: Any, batches: Any) -> float:
        nonlocal measured
        for _ in range(2):
            step(next(batches))
        measured += 0.5
        return measured

    monkeypatch.setattr("mmlong.measure.budget.step_seconds", step_seconds)
    status, said = mmlong("sweep", "-c", recipe, "--grid", "model.optim.lr=1e-3,3e-2", "--minutes", "0.05", "--seeds", "0", "7", "--test", "--out", "out")  # fmt: skip
    assert status == 0, said
    found = table("out")
    # 3 seconds hold 6 steps of half a second, or 3 of a whole one; a setting is measured once for its seeds.
    assert [(row["steps"], row["step_seconds"]) for row in found] == [(6, 0.5), (6, 0.5), (3, 1.0), (3, 1.0)]
    assert sum(words[1] == "mmlong.cli.trial" for words in ran) == 2
    assert all("test/accuracy" in row["metrics"] and row["flops"] > 0 and row["parameters"] > 0 for row in found)


def test_a_run_that_was_stopped_goes_on(
    mmlong: Call, recipe: str, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sweep", "-c", recipe, "--grid", "model.optim.lr=1e-3", "--steps", "12"]  # more than an epoch has
    assert mmlong(*words, "--out", "whole")[0] == 0
    method, calls = ClassifyTask.training_step, 0

    def step(self: ClassifyTask, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return method(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifyTask, "training_step", step)
        assert mmlong(*words)[0] == 130
    assert not Path("runs/sweep/noise/sweep.json").exists()
    status, said = mmlong(*words)
    assert status == 0, said
    assert ran[-1][-1].startswith("--ckpt_path=runs/sweep/noise/runs/")
    (row,), (whole,) = table(), table("whole")
    assert row["steps"] == 12
    assert row["metrics"]["val/accuracy"] == whole["metrics"]["val/accuracy"]
    assert row["metrics"]["train/loss"] == whole["metrics"]["train/loss"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "model.optim.lrr=1,2"], "did you mean 'model.optim.lr'"),
        (["--grid", "max_steps=1,2"], "did you mean 'trainer.max_steps'"),
        (["--grid", "model.optim.lr=1e-3,abc"], "model.optim.lr: Expected a float. Got value: abc"),
        (["--grid", "model.optim.lr=1e-3", "--model.optim.lr=2"], "in --grid and given besides"),
        (["--grid", "model.optim.lr=1e-3", "--model.optm.ema=2"], "did you mean 'model.optim'"),
        (["--grid", "seed_everything=1,2"], "give --seeds"),
        (["--grid", "run_dir=a,b"], "the sweep sees to it"),
        (["--grid", "model.optim.lr"], "is not KEY=V1,V2"),
        ([], "what is to be tried?"),
        (["--grid", "model.optim.lr=1", "--steps", "0"], "--steps at least 1"),
        (["--grid", "model.optim.lr=1", "--steps", "2", "--minutes", "1"], "two ways to say how long"),
        (["--grid", "model.optim.lr=1", "--seeds", "1", "1"], "no seed comes twice"),
        (["--grid", "model.optim.lr=1", "--steps", "few"], "invalid int value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_trained(
    words: list[str], said: str, mmlong: Call, recipe: str, ran: list[list[str]]
) -> None:
    status, answer = mmlong("sweep", "-c", recipe, *words)
    assert status == 2
    assert said in answer
    assert len(answer.splitlines()) == 1, answer
    assert not ran
    assert not Path("runs").exists()


def test_help_and_no_recipe(mmlong: Call) -> None:
    assert "--grid" in mmlong("sweep", "--help")[1]
    assert "which recipe?" in mmlong("sweep", "--grid", "model.optim.lr=1")[1]


@pytest.mark.slow
def test_killed_without_warning_it_goes_on(recipe: str) -> None:
    words = [
        sys.executable,
        "-m",
        "mmlong",
        "sweep",
        "-c",
        recipe,
        "--grid",
        "model.optim.lr=1e-3,1e-2",
        "--steps",
        "24",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)  # fmt: skip
    runs = Path("runs/sweep/noise/runs")
    while not list(runs.glob("*/checkpoints/step=*.ckpt")):
        assert first.poll() is None, first.stdout and first.stdout.read()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["steps"] for row in table()] == [24, 24]
    assert not any(row["failed"] for row in table())
    assert any("going on from" in log.read_text() for log in runs.glob("*.log"))
    again = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert again.returncode == 0
    assert "steps; " not in again.stdout
