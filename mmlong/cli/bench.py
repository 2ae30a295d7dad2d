"""``mmlong bench``: what is to be measured. Here, ``data``: how fast a recipe's loader delivers, held against what its model consumes; the rest is in :mod:`mmlong.cli.bench_speed`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlong.cli.build import build, parse
from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes, main_recipes
from mmlong.cli.train import check_config, hush, split_arguments
from mmlong.registry import nearest

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from mmlong.tasks import Task

HELP = """\
usage: mmlong bench WHAT [...]

  mixers     mmlong bench mixers mamba2 local --lengths 16384,65536 --against all    layers: seconds, memory, growth, beside other people's
  blocks     mmlong bench blocks mamba2                                              mixer and feed-forward
  models     mmlong bench models -c text/stdlib_ar --dtype fp32,bf16                 a training step of a recipe; without -c the default backbone's
  stream     mmlong bench stream mamba2 --tokens 100000                              one token at a time
  table      mmlong bench table --json table.json --plot table.png                   the README's table, and what was aimed at
  data       mmlong bench data -c image/cells256                                     how fast the recipe's loader delivers
  peers      other people's modules that ours can be run against
  show       mmlong bench show table.json                                            the table of a saved report

`mmlong bench WHAT --help` says more.
"""
USAGE = """\
usage: mmlong bench data -c RECIPE [-c RECIPE ...] [--KEY VALUE ...] [--run FOLDER] [--seconds S]

Run the training loader of a recipe alone, as it is set (workers, batch size, augmentation, cache), and say how much it delivers.

  -c RECIPE      a YAML file, or the name of a packaged recipe; several are merged, the later wins
  --KEY VALUE    any key of the recipe, e.g. --data.num_workers 2
  --run FOLDER   a finished run of it: its training speed is what the loader is held against
  --seconds S    for how long (default 10)

recipes: {recipes}
"""
SPEED = ("mixers", "blocks", "models", "stream", "table", "peers", "show")
WARM_UP = 2  # batches before the clock starts: workers begin, files are opened


def run_bench(argv: list[str]) -> int:
    """Run ``mmlong bench``.

    Raises:
        CommandError: something is wrong with the command, the recipe or the data.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] in SPEED:
        from mmlong.cli.bench_speed import run_speed

        return run_speed(argv[0], argv[1:])
    if argv[0] != "data":
        known = ("data", *SPEED)
        raise CommandError(f"there is no bench {argv[0]!r}{nearest(argv[0], known)}; there are: {', '.join(known)}")
    if any(arg in ("-h", "--help") for arg in argv[1:]):
        print(USAGE.format(recipes=", ".join(main_recipes())), end="")
        return 0
    own = argparse.ArgumentParser(prog="mmlong bench data", add_help=False, allow_abbrev=False)
    own.add_argument("--run", type=Path)
    own.add_argument("--seconds", type=float, default=10.0)
    options, rest = own.parse_known_args(argv[1:])
    names, overrides = split_arguments(rest)
    if not names:
        raise CommandError(
            f"which recipe? e.g. mmlong bench data -c image/cells256; recipes: {', '.join(main_recipes())}"
        )
    if not options.seconds > 0:
        raise CommandError(f"--seconds {options.seconds}: for how long? Give a positive number")
    consumed = None if options.run is None else _consumed(options.run)
    hush()
    config = load_recipes(names, overrides)
    check_config(config, overrides, " + ".join(names))

    from mmlong.datamodules.errors import DataError

    try:
        data, task = _build(config, overrides)
        samples, tokens, seconds, batches = deliver(data, task, options.seconds)
    except (DataError, ValueError) as error:
        raise CommandError(str(error), status=1) from error
    workers = getattr(data, "num_workers", 0)
    print(
        f"{config['recipe']}: the loader delivers {samples / seconds:,.0f} samples and {tokens / seconds:,.0f} tokens a second\n"
        f"({batches:,} batches in {seconds:.1f} s, {workers} worker processes)"
    )
    if consumed is not None:
        print(
            f"training in {options.run} took {consumed:,.0f} tokens a second: "
            f"the loader is {tokens / seconds / consumed:,.1f} times as fast"
        )
    return 0


def _consumed(run: Path) -> float:
    summary = run / "summary.json"
    if not summary.is_file():
        raise CommandError(f"--run {run}: no finished run (it has no summary.json)")
    try:
        rate = float(json.loads(summary.read_bytes())["tokens_per_second"])
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{summary} does not say tokens_per_second: {error}") from error
    if not rate > 0:
        raise CommandError(f"{summary} says {rate} tokens_per_second; it was not measured in that run")
    return rate


def _build(config: dict[str, Any], overrides: list[str]) -> tuple[pl.LightningDataModule, Task]:
    """The recipe's datamodule and task."""
    return build(*parse(config, overrides))


def deliver(data: pl.LightningDataModule, task: Task, seconds: float) -> tuple[int, int, float, int]:
    """Take batches of the training loader for about so many seconds, epoch after epoch.

    Returns:
        ``(samples, tokens, seconds, batches)``.

    Raises:
        DataError: the data is not there, or is bad.
        ValueError: there is not one batch in it.
    """
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    samples = tokens = batches = taken = 0
    begun = time.perf_counter()
    try:
        while True:
            before = taken
            for batch in loader:
                taken += 1
                if taken <= WARM_UP:
                    task.encode(batch)  # what the model would be given is what it takes
                    begun = time.perf_counter()
                    continue
                batches += 1
                samples += len(batch["raw"])
                tokens += task.tokens_in(batch)
                if (elapsed := time.perf_counter() - begun) >= seconds:
                    return samples, tokens, elapsed, batches
            if taken == before:
                raise ValueError("the training loader gives no batches")
    finally:
        data.teardown("fit")
