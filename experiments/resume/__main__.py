"""Kill a run at random moments, resume it each time, and compare its final weights with an undisturbed run's.

``python -m mmlong.experiments.resume [--kills 20] [--ranks 1|2] [--workers 2]``

Moments are drawn evenly over the time a run takes: most fall into training, every fifth into the start of the process.
If a run ends before all kills are spent, it is compared and another is begun. Exit status 0 if all weights agree.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmlong.experiments.command import experiment_parser
from safetensors.torch import load_file

from mmlong.training.checkpoints import PARTIAL, newest_whole

POLL = 0.005  # seconds
LIMIT = 600.0  # seconds one process may take


@dataclass
class Tally:
    """What was done and what came of it."""

    kills: int = 0
    before_first_step: int = 0
    in_a_write: int = 0
    torn: int = 0
    runs: int = 0
    identical: int = 0
    steps: list[int] = field(default_factory=list)


class Job:
    """One process group of ``mmlong.experiments.resume.job``."""

    def __init__(self, command: list[str], run: Path) -> None:
        self.run = run
        run.mkdir(parents=True, exist_ok=True)
        (run / "started").unlink(missing_ok=True)
        with open(run / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mmlong.experiments.resume.job", *command, "--run", str(run)],
                start_new_session=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            )  # fmt: skip
        self.begun = time.monotonic()

    def wait_started(self) -> bool:
        """Wait for its first step; false if it ended without one."""
        while not (self.run / "started").exists():
            if self.ended():
                return False
            time.sleep(POLL)
        return True

    def ended(self) -> bool:
        """Whether it is over.

        Raises:
            RuntimeError: it failed, or takes too long.
        """
        status = self.process.poll()
        if status is None and time.monotonic() - self.begun > LIMIT:
            os.killpg(self.process.pid, signal.SIGABRT)  # every process writes where it is into the log
            time.sleep(1)
            self.kill()
            raise RuntimeError(f"the run takes longer than {LIMIT:.0f} s; it stood here:\n{self._log()}")
        if status not in (None, 0):
            raise RuntimeError(f"the run failed with status {status}:\n{self._log()}")
        return status is not None

    def _log(self) -> str:
        return (self.run / "log.txt").read_text(errors="replace")[-20_000:]

    def run_out(self, seconds: float = float("inf")) -> bool:
        """Let it run for so long; true if it ended by itself."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.ended():
                return True
            time.sleep(POLL)
        return self.ended()

    def kill(self) -> None:
        """SIGKILL to it, its ranks and its workers, all at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def disturb(
    kills: int, ranks: int, workers: int, steps: int, accumulate: int, ema: bool, seed: int, work: Path, quiet: bool = False
) -> Tally:  # fmt: skip
    """Run the experiment in the folder ``work``. See the module's docstring.

    Returns:
        The tally; all is well if ``identical == runs``.

    Raises:
        RuntimeError: a run failed by itself.
    """
    from mmlong.experiments.resume.job import pack_synthetic

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    draw = random.Random(seed)
    data = work / "data"
    pack_synthetic(data)
    command = ["--data", str(data), "--ranks", str(ranks), "--workers", str(workers), "--steps", str(steps)]
    command += ["--accumulate", str(accumulate)] + (["--ema"] if ema else [])
    whole = Job(command, work / "whole")
    whole.wait_started()
    start_takes = time.monotonic() - whole.begun
    whole.run_out()
    takes = time.monotonic() - whole.begun - start_takes
    expected = load_file(work / "whole" / "final.safetensors")
    say(
        f"undisturbed: {steps} steps in {takes:.1f} s after {start_takes:.1f} s of start; {ranks} ranks, {workers} workers each"
    )
    tally = Tally()
    while True:
        tally.runs += 1
        run = work / f"killed-{tally.runs}"
        while tally.kills < kills:
            job = Job(command, run)
            early = draw.random() < 0.2
            if early:
                over = job.run_out(draw.uniform(0, start_takes))
            else:
                over = not job.wait_started() or job.run_out(draw.uniform(0, 1.5 * takes / (kills + 1)))
            if over:
                break
            job.kill()
            tally.kills += 1
            tally.before_first_step += not (run / "started").exists()
            tally.in_a_write += any(run.glob("*" + PARTIAL))
            newest, torn = newest_whole(run)
            tally.torn += len(torn)
            tally.steps.append(0 if newest is None else int(newest.stem.partition("=")[2]))
            say(f"  kill {tally.kills:2d}: goes on from step {tally.steps[-1]}")
            for partial in run.glob("*" + PARTIAL):
                partial.unlink()
        if not (run / "final.safetensors").exists():
            Job(command, run).run_out()
        found = load_file(run / "final.safetensors")
        same = found.keys() == expected.keys() and all(
            torch.equal(found[name], value) for name, value in expected.items()
        )
        tally.identical += same
        say(f"  run {tally.runs} ended: weights {'identical to the bit' if same else 'DIFFER'}")
        if tally.kills >= kills:
            return tally


def main(argv: list[str] | None = None) -> int:
    """Command line; prints the tally."""
    parser = experiment_parser("resume", __doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each rank")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of a run")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--ema", action="store_true", help="keep averaged weights as well")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mmlong-resume-") as work:
        tally = disturb(
            args.kills, args.ranks, args.workers, args.steps, args.accumulate, args.ema, args.seed, Path(work)
        )
    print(
        f"{tally.kills} kills ({tally.before_first_step} before the first step, {tally.in_a_write} while a checkpoint was being "
        f"written), {tally.torn} torn checkpoints; {tally.identical} of {tally.runs} runs ended with weights identical to the "
        f"undisturbed run, to the bit"
    )
    return 0 if tally.identical == tally.runs else 1


if __name__ == "__main__":
    sys.exit(main())
