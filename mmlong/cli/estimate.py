"""``mmlong estimate``: what a training step of a recipe will take, at any length and on any number of ranks, without its data and without running it."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes, main_recipes
from mmlong.cli.train import check_config, hush, pairs, split_arguments

if TYPE_CHECKING:
    from mmlong.estimate.devices import Device
    from mmlong.estimate.plan import Estimate
    from mmlong.estimate.step import Batch
    from mmlong.tasks import Task

USAGE = """\
usage: mmlong estimate -c RECIPE [-c RECIPE ...] [--KEY VALUE ...] [options]

What one training step (forward, backward, optimiser) of a recipe takes: parameters, floating-point operations, memory, bytes sent between ranks, and the least time on a device.
Nothing is trained and no data is read: the step is followed on shapes, at its own length or at a few shorter ones.

  -c RECIPE       a YAML file, or the name of a packaged recipe; several are merged, the later wins
  --KEY VALUE     any key of the recipe, e.g. --model.segment 16384, --model.backbone.dim 512, --trainer.precision bf16-mixed
  --length L      tokens of a row, e.g. 1e9, 1_000_000, 64k (k = 1,024, M = 1,048,576); default: the recipe's
  --batch N       rows of a rank; under sequence_parallel of all ranks together; default: the recipe's
  --ranks R       how many processes share the work (default 1)
  --strategy S    how: ddp, fsdp or sequence_parallel; default: the last for a model that streams, else ddp
  --device NAME   whose time: {devices} (here: this machine, measured now; default: none)
  --json FILE     also write everything there; - for standard output alone
  --check         run the step on this machine too, in processes of its own, and say how far off the estimate is

recipes: {recipes}
"""
LENGTH = re.compile(r"(\d[\d_,]*(?:\.\d+)?)(?:e\+?(\d+))?\s*([kKM]?)")
SUFFIX = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20}
MARK = "mmlong-measured: "
"""Begins the line that holds what a measuring process found."""
OWN = ("length", "batch", "ranks", "strategy", "device", "json")


def run_estimate(argv: list[str]) -> int:
    """Run ``mmlong estimate``.

    Raises:
        CommandError: something is wrong with the command or the recipe, or they do not fit together.
    """
    if not argv or any(arg in ("-h", "--help") for arg in argv):
        from mmlong.estimate.devices import DEVICES, HERE

        print(USAGE.format(recipes=", ".join(main_recipes()), devices=", ".join([HERE, *DEVICES])), end="")
        return 0 if argv else 2
    options, rest = _options(argv)
    names, overrides = split_arguments(rest)
    if not names:
        raise CommandError(
            f"which recipe? e.g. mmlong estimate -c image/cells256; recipes: {', '.join(main_recipes())}"
        )
    if options.check and options.ranks > 1:
        raise CommandError("--check runs one process here: leave --ranks out")
    hush()
    config = load_recipes(names, overrides)
    check_config(config, overrides, " + ".join(names))
    from mmlong.datamodules.errors import DataError

    try:
        recipe = Recipe(config, overrides, options.batch, options.length)
        if options.measure:
            return _measured_here(recipe)
        device = _device(options.device)
        found = recipe.estimate(options.ranks, options.strategy)
    except (DataError, ValueError) as error:
        raise CommandError(str(error), status=1) from error
    checks = _check(argv, found) if options.check else {}
    report = _report(recipe, options, found, device, checks)
    if options.json == "-":
        print(json.dumps(report, indent=2))
        return 0
    print(_told(report))
    if options.json is not None:
        try:
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise CommandError(f"--json {options.json}: {error.strerror or error}", status=1) from error
    return 0


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own = argparse.ArgumentParser(prog="mmlong estimate", add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--length", type=parse_length)
    own.add_argument("--batch", type=parse_length)
    own.add_argument("--ranks", type=parse_length, default=1)
    for name in ("strategy", "device", "json"):
        own.add_argument(f"--{name}")
    own.add_argument("--check", action="store_true")
    own.add_argument("--measure", action="store_true")  # what --check starts
    try:
        return own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise CommandError(str(error).removeprefix("argument ")) from error


def parse_length(text: str) -> int:
    """A whole number of at least 1 as people write it: ``1e9``, ``1_000_000``, ``64k``, ``1.5M``.

    Raises:
        ArgumentTypeError: it is none.
    """
    found = LENGTH.fullmatch(text.strip())
    if found is not None:
        digits, power, suffix = found.groups()
        value = float(re.sub("[_,]", "", digits)) * 10 ** int(power or 0) * SUFFIX[suffix]
        if value >= 1 and value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1; write 65536, 1_000_000, 64k or 1e9")


def _device(name: str | None) -> Device | None:
    from mmlong.estimate.devices import find_device

    return None if name is None else find_device(name)


class Recipe:
    """A recipe as an estimate needs it.

    Args:
        config: the merged recipes.
        overrides: arguments of the command line.
        batch, length: in place of the recipe's.

    Raises:
        ValueError: a length for a modality that fixes it, or none where it does not.
    """

    def __init__(self, config: dict[str, Any], overrides: list[str], batch: int | None, length: int | None) -> None:
        from mmlong.cli.build import build, parse

        self.name = config["recipe"]
        given = dict(pairs(overrides))
        self.trainer = dict(config.get("trainer") or {})
        for key, value in given.items():
            if key.startswith("trainer."):
                self.trainer[key.removeprefix("trainer.")] = _plain(value)
        self._parts = parse(config, overrides)
        self._build = build
        data, task = build(*self._parts)
        self.streamed = getattr(data, "windows", None) == "stream"
        rows = batch or getattr(data, "batch_size", None)
        if rows is None:
            raise ValueError(f"{type(data).__name__} does not say how many rows a batch has: give --batch")
        self.batch = int(rows)
        fixed = task.model.modality.tokens_per_sample()
        if fixed is not None and length not in (None, fixed):
            raise ValueError(
                f"a sample of this recipe has {fixed:,} {task.model.modality.unit}s, whatever --length says: change the data's size instead (--data.size)"
            )
        self.length = None if fixed is not None else length or getattr(data, "length", None)
        if fixed is None and self.length is None:
            raise ValueError("the recipe takes samples of any length: give --length")
        self.tokens = fixed or task.model.modality.tokens_per_step * (self.length or 0)
        self._first: Task | None = task

    def task(self) -> Task:
        """A fresh task."""
        if self._first is not None:
            task, self._first = self._first, None
            return task
        return self._build(*self._parts)[1]

    def maker(self, task: Task) -> Callable[[int, int | None], Batch]:
        """Makes batches of so many rows of a length for a task."""
        from mmlong.estimate.step import synthetic_batch

        return lambda rows, length: synthetic_batch(task, rows, length, self.streamed)

    def estimate(self, ranks: int, strategy: str | None) -> Estimate:
        """The estimate."""
        from mmlong.estimate.plan import Shape, estimate
        from mmlong.estimate.step import TrainingStep

        task = self.task()
        step = TrainingStep(task, self.trainer)
        return estimate(step, self.maker(task), Shape(self.batch, self.length, ranks, strategy))

    def measure(self) -> dict[str, float]:
        """The step as it is here, in this process."""
        from mmlong.estimate.measure import measure

        def build() -> tuple[Task, Batch]:
            task = self.task()
            return task, self.maker(task)(self.batch, self.length)

        return measure(build, self.trainer)


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _measured_here(recipe: Recipe) -> int:
    print(MARK + json.dumps(recipe.measure()))
    return 0


def _check(argv: list[str], found: Estimate) -> dict[str, dict[str, float]]:
    """The same step run here: in a process that gives back what it frees, and in a plain one."""
    from mmlong.estimate.measure import GIVE_BACK
    from mmlong.measure.memory import available_bytes

    free, needed = available_bytes(), found.memory["peak"]
    if free is not None and needed > free:
        raise CommandError(
            f"--check: the step needs about {_size(needed)}, and this machine has {_size(free)} free: check a shorter --length or a smaller --batch",
            status=1,
        )
    words = [sys.executable, "-m", "mmlong", "estimate", *(arg for arg in argv if arg != "--check"), "--measure"]
    return {name: _measured(words, environment) for name, environment in (("exact", GIVE_BACK), ("plain", {}))}


def _measured(words: list[str], environment: dict[str, str]) -> dict[str, float]:
    from mmlong.bench.process import how_it_died

    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise CommandError(f"--check: {how_it_died(done.returncode, done.stderr)}", status=1)


def _report(
    recipe: Recipe,
    options: argparse.Namespace,
    found: Estimate,
    device: Device | None,
    checks: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Everything, as plain values."""
    import dataclasses

    from mmlong.estimate.devices import roofline

    report: dict[str, Any] = {
        "recipe": recipe.name,
        "batch": recipe.batch,
        "length": recipe.tokens,
        "tokens": found.tokens,
        "ranks": options.ranks,
        "strategy": found.strategy,
        "precision": recipe.trainer.get("precision") or "32-true",
        "parameters": {"all": found.parameters[0], "trained": found.parameters[1]},
        "flops": {
            "step": found.flops, "forward": found.counts["forward"], "forward_again": found.recomputed,
            "backward": found.flops - found.counts["forward"] - found.recomputed,
        },
        "memory": found.memory,
        "sent": found.sent,
        "bubble": found.bubble,
        "notes": list(found.notes),
    }  # fmt: skip
    if device is not None:
        seconds = roofline(found.counts, device)
        link = sum(found.sent.values()) / device.link
        step = sum(seconds.values()) / (1 - found.bubble) + link
        report["device"] = dataclasses.asdict(device)
        report["seconds"] = {
            **seconds,
            "waiting for other ranks": sum(seconds.values()) * found.bubble / (1 - found.bubble),
            "sending": link,
            "step": step,
        }
        if found.memory["peak"] > device.memory:
            report["notes"].append(f"does not fit: {device.name} has {_size(device.memory)}")
    if checks:
        exact, plain = checks["exact"], checks["plain"]
        report["measured"] = {
            "peak": exact["peak"], "flops": exact["flops"], "seconds": plain["seconds"], "resident": plain["peak"],
            "peak_error": found.memory["peak"] / exact["peak"] - 1, "flops_error": found.flops / exact["flops"] - 1,
        }  # fmt: skip
    return report


def _told(report: dict[str, Any]) -> str:
    """The report for people."""
    shared = f", {report['ranks']} ranks ({report['strategy']})" if report["strategy"] else ""
    flops, parameters = report["flops"], report["parameters"]
    again = f", {_count(flops['forward_again'])} the forward again" if flops["forward_again"] else ""
    lines = [
        f"{report['recipe']}: one step of {report['batch']:,} x {report['length']:,} tokens{shared}, {report['precision']}",
        "",
        f"parameters   {parameters['all']:,}"
        + ("" if parameters["all"] == parameters["trained"] else f", {parameters['trained']:,} trained"),
        f"arithmetic   {_count(flops['step'])}FLOP{' a rank' if shared else ''}: {_count(flops['forward'])} forward{again}, {_count(flops['backward'])} backward",
        f"memory       {_size(report['memory']['peak'])} at the peak, in tensors{' of a rank' if shared else ''}",
    ]
    lines += [f"  {_size(size):>10}  {what}" for what, size in report["memory"].items() if what != "peak" and size]
    if report["sent"]:
        lines.append(f"sent         {_size(sum(report['sent'].values()))} by a rank")
        lines += [f"  {_size(size):>10}  {what}" for what, size in report["sent"].items()]
    if report["bubble"]:
        lines.append(f"waiting      {report['bubble']:.0%} of a rank's time")
    if "seconds" in report:
        seconds, device = report["seconds"], report["device"]
        lines.append(
            f"time         {_seconds(seconds['step'])} at least on {device['name']}: {report['tokens'] / seconds['step']:,.0f} tokens a second (roofline)"
        )
        lines += [f"  {_seconds(value):>10}  {what}" for what, value in seconds.items() if what != "step" and value]
    else:
        lines.append(
            "time         of which machine? --device here measures this one; or --device h100, ...; --check runs a step"
        )
    if "measured" in report:
        m = report["measured"]
        lines += [
            "measured here, in processes of their own",
            f"  {_size(m['peak']):>10}  peak; the estimate is {m['peak_error']:+.1%} off",
            f"  {_count(m['flops']):>6}FLOP  the estimate is {m['flops_error']:+.1%} off",
            f"  {_seconds(m['seconds']):>10}  a step",
            f"  {_size(m['resident']):>10}  resident in a process that keeps what it frees (glibc's default)",
        ]  # fmt: skip
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def _count(value: float) -> str:
    for suffix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {suffix}"
        value /= 1000
    return f"{value:.4g} E"


def _size(value: float) -> str:
    value /= 1e6
    for unit in ("MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} PB"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 3600:.3g} h"
