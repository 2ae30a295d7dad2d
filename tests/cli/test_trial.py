"""A trial in a process of its own: what it says, why it failed, that nobody else works on it; and the table that is kept."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmlong.cli import trial as code
from mmlong.cli.trial import (
    Cost,
    Trial,
    TrialBusyError,
    TrialFailedError,
    fit_words,
    key_value,
    last_metrics,
    reason,
    run_logged,
)
from mmlong.cli.trial_table import BadTableError, Row, TrialTable, better_first, summarise


def test_what_a_process_says_is_kept_and_read(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "a.log"
    assert run_logged(["-c", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"], log, 3) == "threads 3\n"
    assert run_logged(["-c", "print('again')"], log) == "again\n"  # and not what was said before
    assert log.read_text() == "threads 3\nagain\n"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; print('mmlong fit: no such key'); print('more'); sys.exit(2)", "mmlong fit: no such key"),
        ("raise ValueError('a bad thing')", "exit status 1: ValueError: a bad thing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL (out of memory, most likely)"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_why_it_failed(program: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrialFailedError) as error:
        run_logged(["-c", program], tmp_path / "a.log")
    assert str(error.value) == said


@pytest.mark.parametrize("status", [130, 143])
def test_one_that_was_stopped_stops_the_rest(status: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_logged(["-c", f"import sys; sys.exit({status})"], tmp_path / "a.log")


def test_reason_is_the_last_answer() -> None:
    assert reason(1, "mmlong fit: one\nmmlong fit: two\n  at line 3\n") == "mmlong fit: two"
    assert reason(1, "trains by mmlong fit: it says\nKeyError: 3") == "exit status 1: KeyError: 3"


def test_two_do_not_work_on_one(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with open(log, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TrialBusyError, match="still works on it"):
            run_logged(["-c", "print(1)"], log)
    assert run_logged(["-c", "print(1)"], log) == "1\n"


def test_an_orphan_keeps_its_lock(tmp_path: Path) -> None:
    log, pid = tmp_path / "a.log", tmp_path / "pid"
    orphan = f"import os, time; open({str(pid)!r} + '.part', 'w').write(str(os.getpid())); os.rename({str(pid)!r} + '.part', {str(pid)!r}); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path; from mmlong.cli.trial import run_logged; run_logged(['-c', {orphan!r}], Path({str(log)!r}))"]
    )  # fmt: skip
    while not pid.exists():
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    try:
        with pytest.raises(TrialBusyError):
            run_logged(["-c", "print(1)"], log)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    for _ in range(500):  # until the system has buried it
        try:
            assert run_logged(["-c", "print(1)"], log) == "1\n"
            return
        except TrialBusyError:
            time.sleep(0.02)
    raise AssertionError("the lock outlived the process")


def test_a_run_that_another_process_has_begun_is_left_alone(tmp_path: Path) -> None:
    """It has no checkpoint yet, as one that was killed would not."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with open(tmp_path / "run.log", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TrialBusyError, match=r"run\.log"):
            code.train(Trial(("text/news",)), run, 1)
    assert (run / "config.yaml").is_file()


def test_words_and_keys(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("a: 1\n")
    one = Trial((str(recipe),), {"model.x": [1, "b"], "data.y": "z", "model.n": None}, 4)
    assert one.words == ["-c", str(recipe), '--model.x=[1, "b"]', "--data.y=z", "--model.n=null"]
    assert fit_words(one, None) == ["fit", *one.words, "--seed_everything=4"]
    assert fit_words(one, 7)[-3:] == [
        "--trainer.max_steps=7",
        "--trainer.val_check_interval=7",
        "--trainer.check_val_every_n_epoch=null",
    ]
    own = Trial((str(recipe),), {"trainer.val_check_interval": 3})
    assert fit_words(own, 7)[-1] == "--trainer.max_steps=7"
    key = one.key(1)
    assert len({key, one.key(2), Trial(one.recipes, {"model.x": 3}).key(1)}) == 3
    assert Trial(one.recipes, dict(one.options), 9).key(1) == key  # the seed is among what else is said
    recipe.write_text("a: 2\n")
    assert one.key(1) != key
    assert key_value("--a.b=c=d") == ("a.b", "c=d")


def test_metrics_are_the_last_of_each(tmp_path: Path) -> None:
    assert last_metrics(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("step,epoch,val/accuracy,train/loss\n1,0,0.5,\n2,0,,3.0\n3,0,0.75,\n")
    assert last_metrics(tmp_path) == {"val/accuracy": 0.75, "train/loss": 3.0}


def rows() -> list[Row]:
    return [
        Row("a", {"lr": "1"}, 0, {"val/bits": 2.0}, steps=3),
        Row("b", {"lr": "1"}, 1, {"val/bits": 3.0}, steps=3),
        Row("c", {"lr": "2"}, 0, {"val/bits": 1.0}),
        Row("d", {"lr": "2"}, 1, failed="it died"),
        Row("e", {"lr": "3"}, 0, {"val/bits": 2.0}),
        Row("f", {"lr": "4"}, 0, failed="it died too"),
    ]


def test_mean_spread_and_order() -> None:
    found = summarise(rows(), "val/bits")
    assert [one.mean for one in found] == [2.5, 1.0, 2.0, None]
    assert found[0].told == "2.5000 (2.0000 to 3.0000)"
    assert (found[2].told, found[3].told) == ("2.0000", "failed")
    # One whose seed failed is no winner.
    assert [one.setting["lr"] for one in better_first(found, less=True)] == ["3", "1", "2", "4"]
    assert [one.setting["lr"] for one in better_first(found, less=False)] == ["1", "3", "2", "4"]


def test_a_table_is_kept_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    table = TrialTable(path, about={"command": ["x"]}, costs={"k": Cost(0.5, 10, 20, 30)})
    for row in rows():
        table.add(row)
    back = TrialTable.load(path)
    assert (back.rows, back.costs, back.about) == (table.rows, table.costs, table.about)
    assert back.done("d")
    assert not back.done("d", retry=True)
    assert back.done("a", retry=True)
    assert not back.done("z")
    for text in (
        "{",
        "[]",
        '{"format": 9}',
        '{"format": 1}',
        json.dumps({"format": 1, "rows": [{"key": 1}], "costs": {}, "about": {}}),
    ):
        path.write_text(text)
        with pytest.raises(BadTableError, match=r"table\.json"):
            TrialTable.load(path)


def test_a_killed_run_goes_on_and_one_without_a_checkpoint_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mmlong.training.checkpoints.newest_whole", lambda folder: (next(iter(folder.glob("*.ckpt")), None), [])
    )
    run = tmp_path / "run"
    assert code.folder_option(run) == f"--run_dir={run}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    assert code.folder_option(run) == f"--run_dir={run}"
    assert not run.exists()
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (run / "checkpoints" / "step=3.ckpt").write_text("")
    assert code.folder_option(run) == f"--ckpt_path={run}"
