"""One training of many: a recipe with some options changed, in a process of its own, that goes on where it was killed and says in a line why it failed.

Behind ``mmlong sweep`` and the comparisons of ``mmlong.experiments``. A trial is measured first (:func:`cost`: CPU seconds of a step on the recipe's own batches, :mod:`mmlong.measure.budget`) and then trained by the very command that a person would
type, ``mmlong fit``, which is kept beside its result. What a process says goes to a log file beside its run folder; the log is locked for as long as the process lives, so that a second command does not train what an orphan still does.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mmlong.bench.process import how_it_died
from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes
from mmlong.cli.train import words_of, written
from mmlong.runs import CHECKPOINTS, is_run

MARK = "mmlong-trial-cost: "
"""Begins the line that holds what :func:`cost` asked a process for."""
SUMMARY = "summary.json"
STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
"""Statuses of a training that was told to stop and saved where it was."""


class TrialFailedError(RuntimeError):
    """A process of a trial ended without a result; the message says why, in a line."""


class TrialBusyError(CommandError):
    """A trial that another process still works on."""


@dataclass(frozen=True)
class Trial:
    """What is trained.

    Attributes:
        recipes: names or files, merged left to right.
        options: beside the recipes', by key (:func:`mmlong.cli.train.written`).
        seed: of weights and dropout (``seed_everything``).
    """

    recipes: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def words(self) -> list[str]:
        """Of a command, without the seed."""
        return words_of(self.recipes, self.options)

    def key(self, *more: Any) -> str:
        """Of what is trained and ``more``: ten hexadecimal digits, another for another content of the recipes."""
        what = [load_recipes(list(self.recipes)), {key: written(value) for key, value in self.options.items()}, *more]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Cost:
    """What a training step takes: CPU seconds, parameters that train, floating-point operations, tokens."""

    seconds: float
    parameters: int
    flops: int
    tokens: int


def key_value(text: str) -> tuple[str, str]:
    """``KEY=VALUE`` as ``(key, value)``: the type of an option of argparse.

    Raises:
        ArgumentTypeError: it is not written so.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[TextIO]:
    """A file, opened to append to and locked. A process that inherits it keeps the lock, should this one be killed: one whose output it is, or that is started with ``close_fds=False``.

    Raises:
        TrialBusyError: another process still works on it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrialBusyError(
                f"another process still works on it (it holds {lock}): wait until it is done, or end it", status=1
            ) from error
        os.set_inheritable(file.fileno(), True)
        yield file


def run_logged(words: list[str] | Callable[[], list[str]], log: Path, threads: int = 1) -> str:
    """Run ``python WORDS`` to its end; what it said.

    Args:
        words: of the command, behind ``python``; a function is asked for them when nobody else works on it.
        log: where what it says is kept, after what an earlier process said.
        threads: of torch.

    Raises:
        TrialFailedError: it failed.
        TrialBusyError: another process still works on it.
        KeyboardInterrupt: it was stopped.
    """
    with alone(log) as file:
        if callable(words):
            words = words()
        file.seek(0, os.SEEK_END)
        begun = file.tell()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
        # A choice of a run folder is for the ranks of the command that made it.
        environment.pop("MMLONG_RUN_DIR", None)
        process = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was told too, and saves where it is
            raise
        file.seek(begun)
        said = file.read()
    if status in STOPPED:
        raise KeyboardInterrupt
    if status:
        raise TrialFailedError(reason(status, said))
    return said


def reason(status: int, said: str) -> str:
    """Why a process failed, in a line: what the command answered, else the last line of its traceback, else how it died."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"mmlong \w+: ", line)]
    if status > 0 and told:
        return told[-1]
    if status > 0 and lines:
        return f"exit status {status}: {lines[-1]}"
    return how_it_died(status, "").strip()


def cost(trial: Trial, log: Path, threads: int = 1) -> Cost:
    """What a step of it takes, in a process of its own.

    Raises:
        TrialFailedError: it cannot be built or run.
    """
    said = run_logged(["-m", "mmlong.cli.trial", *trial.words], log, threads)
    for line in reversed(said.splitlines()):
        if line.startswith(MARK):
            return Cost(**json.loads(line.removeprefix(MARK)))
    raise TrialFailedError(f"the step was not measured; {log} says more")


def fit_words(trial: Trial, steps: int | None) -> list[str]:
    """Of ``mmlong fit``: the trial for so many steps, validated behind the last; ``None``: as the recipe says."""
    more: dict[str, Any] = {"seed_everything": trial.seed}
    if steps is not None:
        more |= {"trainer.max_steps": steps}
        if "trainer.val_check_interval" not in trial.options:
            # Counted over all batches, however many an epoch has.
            more |= {"trainer.val_check_interval": steps, "trainer.check_val_every_n_epoch": None}
    return ["fit", *trial.words, *words_of((), more)]


def train(trial: Trial, run: Path, steps: int | None, threads: int = 1) -> dict[str, Any]:
    """Train, or go on, or find it done: the run's summary.

    Args:
        trial: what.
        run: its folder; what a killed process left there is gone on with, if it got as far as a checkpoint.
        steps: ``None``: as the recipe says.
        threads: of torch.

    Raises:
        TrialFailedError: it failed; why.
    """
    if not (run / SUMMARY).is_file():
        # Only behind the lock is it known that a folder without a checkpoint is nobody's.
        run_logged(
            lambda: ["-m", "mmlong", *fit_words(trial, steps), folder_option(run)], run.with_name(f"{run.name}.log"), threads
        )  # fmt: skip
    if not (run / SUMMARY).is_file():
        raise TrialFailedError(f"it ended without {run / SUMMARY}")
    return dict(json.loads((run / SUMMARY).read_text()))


def folder_option(run: Path) -> str:
    """The option that names a run's folder: ``--ckpt_path`` of one that a killed process left and that can be gone on with, else ``--run_dir``; what got nowhere is removed."""
    if is_run(run):
        from mmlong.training.checkpoints import newest_whole

        if newest_whole(run / CHECKPOINTS)[0] is not None:
            return f"--ckpt_path={run}"
        shutil.rmtree(run)  # begun here, and killed before there was anything to go on with
    return f"--run_dir={run}"


def last_metrics(run: Path) -> dict[str, float]:
    """The last value of every column of a run's ``metrics.csv``."""
    from mmlong.training.metrics_csv import read_metrics

    rows = read_metrics(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
    return {key: float(value) for row in rows for key, value in row.items() if key not in ("epoch", "step")}


# What the measuring process does


def measure_here(names: list[str], overrides: list[str]) -> Cost:
    """:func:`cost`, in this process. The data is packed if it is not there."""
    import torch
    import yaml

    from mmlong.cli.build import build, parse
    from mmlong.cli.timing import uneven_batches
    from mmlong.cli.train import check_config, hush, pairs
    from mmlong.estimate.step import TrainingStep
    from mmlong.measure.budget import step_seconds
    from mmlong.measure.flops import count_flops

    hush()
    config = load_recipes(names)
    check_config(config, overrides, " + ".join(names))
    torch.manual_seed(0)
    data, task = build(*parse(config, overrides))
    data.prepare_data()
    data.setup("fit")
    task.show_data(data)
    trainer = dict(config.get("trainer") or {})
    for key, value in pairs(overrides):
        if key.startswith("trainer."):
            trainer[key.removeprefix("trainer.")] = yaml.safe_load(value)
    step = TrainingStep(task, trainer)

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            before = True
            for batch in data.train_dataloader():
                before = False
                yield batch
            if before:
                raise ValueError("the data has no training batch")

    uneven = uneven_batches(data)
    if uneven is not None:
        seconds = step_seconds(step, uneven, enough=math.inf)
        mean = sum(map(task.tokens_in, uneven[1:])) / len(uneven[1:])
        batch = min(uneven, key=lambda one: abs(task.tokens_in(one) - mean))
    else:
        kept: dict[str, Any] = {}

        def timed(one: dict[str, Any]) -> None:
            kept["batch"] = one
            step(one)

        seconds = step_seconds(timed, batches())
        batch = kept["batch"]
    flops = count_flops(lambda: step(batch))
    tokens = task.tokens_in(batch) * step.accumulate
    return Cost(seconds, task.model.num_parameters(), flops, tokens)


def main(argv: list[str], measure: Callable[[list[str], list[str]], Cost] = measure_here) -> int:
    """``python -m mmlong.cli.trial -c RECIPE ... --KEY=VALUE``: print what a step takes, marked."""
    from mmlong.cli.train import split_arguments
    from mmlong.datamodules.errors import DataError

    try:
        found = measure(*split_arguments(argv))
    except (CommandError, DataError, ValueError, TypeError, KeyError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"mmlong trial: {' '.join(text.split())}", file=sys.stderr)
        return 1
    print(MARK + json.dumps(vars(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
