"""`mmlong arena`: the grid, what is kept, what goes on, what is refused; and one cell for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmlong.arena import TASKS, Results
from mmlong.cli import arena_run
from mmlong.cli.arena_run import options_of, train
from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes
from mmlong.cli.train import check_config, words_of

Call = Callable[..., tuple[int, str]]


class Pretender:
    """Stands for `mmlong fit`: leaves what a run leaves."""

    def __init__(self, accuracy: float = 0.6, dies: bool = False) -> None:
        self.accuracy, self.dies = accuracy, dies
        self.ran: list[list[str]] = []

    def __call__(self, words: list[str]) -> None:
        self.ran.append(words)
        folder = Path(next(w.partition("=")[2] for w in words if w.startswith(("--run_dir=", "--ckpt_path="))))
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("recipe: x\n")
        (folder / "checkpoints" / "last.ckpt").write_text("weights")
        if self.dies:
            raise RuntimeError("killed")
        steps = int(next((w.partition("=")[2] for w in words if w.startswith("--trainer.max_steps=")), 12))
        (folder / "metrics.csv").write_text(
            f"epoch,step,val/accuracy\n0,{steps // 2 - 1},0.5\n0,{steps - 1},{self.accuracy}\n"
        )
        (folder / "summary.json").write_text(
            json.dumps({"steps": steps, "test/accuracy": self.accuracy, "parameters": 9, "train_cpu_seconds": 1.5})
        )


@pytest.fixture
def pretender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretender:
    found = Pretender()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arena_run, "call", found)
    monkeypatch.setattr(arena_run, "own_step_seconds", lambda config, options: (0.5, 9))
    return found


def test_a_grid_is_trained_kept_and_gone_on_with(pretender: Pretender, mmlong: Call) -> None:
    words = [
        "arena",
        "lra/pathfinder32",
        "lra/listops",
        "--mixers",
        "default",
        "s4d",
        "--seeds",
        "2",
        "--minutes",
        "3",
        "--json",
        "f.json",
    ]
    status, said = mmlong(*words, "--markdown", "t.md", "--plot", "p.png")
    assert status == 0, said
    assert len(pretender.ran) == 8
    assert len({tuple(ran) for ran in pretender.ran}) == 8
    assert all("--trainer.max_steps=360" in ran for ran in pretender.ran)  # 3 minutes of half seconds
    assert "60.0" in Path("t.md").read_text()
    assert Path("p.png").is_file()
    cells = Results.load(Path("f.json")).cells.values()
    assert {(c.steps, c.samples) for c in cells if c.task == "lra/pathfinder32"} == {(360, 360 * 64)}
    assert [c.curve[-1][1] for c in cells] == [0.6] * 8
    again, said = mmlong(*words)
    assert again == 0
    assert len(pretender.ran) == 8, "what is there is not trained again"
    Path("f.json").unlink()
    mmlong(*words)
    assert len(pretender.ran) == 8, "runs that are over are read"
    status, said = mmlong(*words[:2], *words[3:], "--set", "data.batch_size=3", "--runs", "other")
    assert status == 0, said
    assert len(pretender.ran) == 12, "with other options they are other cells"
    assert all("--data.batch_size=3" in ran for ran in pretender.ran[8:])
    assert mmlong("arena", "--show", "--json", "f.json")[0] == 0


def test_a_run_that_was_stopped_goes_on(pretender: Pretender, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "task": TASKS["lra/pathfinder32"], "mixer": "default", "size": "cpu", "seed": 1, "minutes": 1.0, "path": None, "root": tmp_path / "runs", "more": {},
    }  # fmt: skip
    pretender.dies = True
    with pytest.raises(RuntimeError, match="killed"):
        train(**arguments)
    pretender.dies = False
    assert train(**arguments).accuracy == 0.6
    first, second = pretender.ran
    assert first[:3] == ["fit", "-c", "lra/pathfinder32"]
    folder = next(word for word in first if word.startswith("--run_dir=")).partition("=")[2]
    assert second == ["fit", f"--ckpt_path={folder}"]
    with pytest.raises(CommandError, match="begun with other options"):
        train(**{**arguments, "more": {"data.batch_size": 3}})


def test_a_run_that_another_command_trains_is_left_alone(
    pretender: Pretender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that command was killed, and what it had started goes on."""
    arguments: dict[str, Any] = {
        "task": TASKS["lra/pathfinder32"], "mixer": "default", "size": "cpu", "seed": 1, "minutes": 1.0, "path": None, "root": tmp_path / "runs", "more": {},
    }  # fmt: skip
    orphans: list[subprocess.Popen[bytes]] = []

    def orphaned(words: list[str]) -> None:
        folder = Path(next(w.partition("=")[2] for w in words if w.startswith("--run_dir=")))
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text("recipe: x\n")  # and no checkpoint yet
        orphans.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(**arguments, run=orphaned)
    try:
        with pytest.raises(CommandError, match="another process still works on it"):
            train(**arguments)
        assert len(list((tmp_path / "runs").rglob("config.yaml"))) == 1
    finally:
        orphans[0].kill()
        orphans[0].wait()
    assert train(**arguments).accuracy == 0.6


def test_a_run_that_got_nowhere_begins_anew(pretender: Pretender, tmp_path: Path) -> None:
    """Killed before its first checkpoint, it leaves a folder that fit would refuse."""
    arguments: dict[str, Any] = {
        "task": TASKS["lra/pathfinder32"], "mixer": "s4d", "size": "cpu", "seed": 1, "minutes": 1.0, "path": None, "root": tmp_path / "runs", "more": {},
    }  # fmt: skip
    pretender.dies = True
    with pytest.raises(RuntimeError, match="killed"):
        train(**arguments)
    (first,) = pretender.ran
    folder = Path(first[-1].partition("=")[2])
    (folder / "checkpoints" / "last.ckpt").unlink()
    (folder / "left").touch()
    pretender.dies = False
    assert train(**arguments).accuracy == 0.6
    assert pretender.ran == [first, first]
    assert not (folder / "left").exists()


def test_batches_that_are_accumulated_count(pretender: Pretender, tmp_path: Path) -> None:
    more = {"trainer.accumulate_grad_batches": 4, "trainer.val_check_interval": 7}
    for given, checks in ((more, 7), ({"trainer.accumulate_grad_batches": 4}, 60)):
        cell = train(TASKS["lra/pathfinder32"], "default", "cpu", 1, 1.0, None, tmp_path / str(checks), given)
        assert cell.samples == 120 * 64 * 4
        assert f"--trainer.val_check_interval={checks}" in pretender.ran[-1], "in batches, and the user's own wins"
        assert sum(word.startswith("--trainer.val_check_interval") for word in pretender.ran[-1]) == 1


def test_a_step_is_timed_on_the_data_and_with_all_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of their own lengths, and of an optimiser's step as many batches as it accumulates."""
    from mmlong.cli import timing
    from mmlong.estimate.step import TrainingStep

    seen: list[tuple[int, int]] = []

    def forward(self: TrainingStep, batch: dict[str, Any]) -> Any:
        seen.append((int(batch["lengths"].max()), int(batch["lengths"].min())))
        return next(p for p in self.model.parameters()).sum() * 0.0

    monkeypatch.setattr(TrainingStep, "forward", forward)
    config = load_recipes(["lra/retrieval", "lra/retrieval.debug"])
    options = {"data.length": 64, "trainer.accumulate_grad_batches": 3}
    seconds, parameters = timing.own_step_seconds(config, options)
    assert seconds > 0
    assert parameters > 1000
    assert len(seen) == 3 * timing.OWN
    assert seen[0][0] == 128  # two stretches of 64 bytes


def test_a_cell_that_fails_is_told_and_tried_again(pretender: Pretender, mmlong: Call) -> None:
    pretender.dies = True
    status, said = mmlong("arena", "lra/image", "--minutes", "1", "--json", "f.json")
    assert status == 1
    assert "failed: lra/image, default, seed 0: killed" in said
    pretender.dies = False
    status, said = mmlong("arena", "lra/image", "--minutes", "1", "--json", "f.json")
    assert status == 0, said


def test_the_users_copy_is_named_to_the_recipe(pretender: Pretender, mmlong: Call, tmp_path: Path) -> None:
    (tmp_path / "aclImdb").mkdir()
    status, said = mmlong("arena", "lra/text", "--size", "paper", "--source", "lra/text=aclImdb", "--set", "trainer.accelerator=gpu", "--json", "f.json")  # fmt: skip
    assert status == 0, said
    (ran,) = pretender.ran
    assert {
        "--data.dataset=imdb",
        "--data.source_path=aclImdb",
        "--trainer.accelerator=gpu",
        "--seed_everything=0",
    } <= set(ran)
    assert ran[1:5] == ["-c", "lra/text", "-c", "lra/text.paper"]
    assert not any(word.startswith("--trainer.max_steps") for word in ran)
    assert "60.0" in said
    assert "60.0*" not in said
    (cell,) = Results.load(Path("f.json")).cells.values()
    assert cell.data == TASKS["lra/text"].release


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which tasks?"), (["lra/pathfindr32"], "did you mean 'lra/pathfinder32'"), (["lra/text", "--mixers", "mamba3x"], "is no mixer"),
        (["lra/text", "--source", "lra/image=."], "not among the tasks"), (["lra/text", "--source", "lra/text=nowhere"], "is not there"),
        (["lra/text", "--minutes", "3", "--size", "paper"], "--minutes is for --size cpu"), (["lra/text", "--seeds", "0"], "at least 1"),
        (["lra/text", "--set", "seed_everything=3"], "give --seeds"), (["lra/text", "--set", "trainer.max_steps=3"], "give --minutes"),
        (["lra/text", "--set", "x"], "NAME=VALUE"), (["--show"], "which results"), (["lra/text", "--mixers", "s4d:d_state"], "NAME:OPTION=VALUE"),
    ],
)  # fmt: skip
def test_wrong_commands(words: list[str], said: str, pretender: Pretender, mmlong: Call) -> None:
    status, told = mmlong("arena", *words)
    assert status == 2
    assert said in told
    assert not pretender.ran


def test_the_benchmarks_transformer_takes_the_models_place() -> None:
    """Of every task: the recipe's data and batch, the paper size's model and its options."""
    for task in TASKS.values():
        options = options_of(task, "transformer", "cpu", 3, None, {})
        assert options.pop("seed_everything") == 3
        assert all(key.startswith("model.") for key in options)
        assert "model.optim.warmup" not in options
        recipe, paper = (load_recipes(task.recipes(size))["model"]["init_args"] for size in ("cpu", "paper"))
        backbone = {key.removeprefix("model.backbone."): v for key, v in options.items() if ".backbone." in key}
        assert {**recipe["backbone"], **backbone} == paper["backbone"]
        assert backbone["mixers"][0]["name"] == "attention"
        asked = options_of(task, "transformer", "cpu", 3, None, {"model.optim.lr": 0.5})
        assert asked["model.optim.lr"] == 0.5, "what is asked for is not overruled"
        check_config(load_recipes(task.recipes("cpu")), words_of((), options), task.name)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["s4d", "transformer"])
def test_one_for_real(mixer: str, mmlong: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["arena", "lra/pathfinder32", "--size", "debug", "--mixers", mixer, "--json", "f.json"]
    status, said = mmlong(*words)
    assert status == 0, said
    (cell,) = Results.load(Path("f.json")).cells.values()
    assert (cell.mixer, cell.steps, len(cell.curve)) == (mixer, 8, 2)
    assert cell.accuracy is not None
    config = json.loads((tmp_path / f"runs/arena/lra/pathfinder32/debug/{mixer}-0/config.json").read_text())
    mixers = config["backbone"]["mixers"]
    assert (mixers[1][-1] if mixer == "s4d" else mixers[0])["name"] == ("s4d" if mixer == "s4d" else "attention")
