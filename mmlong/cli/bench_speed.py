"""``mmlong bench mixers | blocks | models | stream | table | peers | show``: the face of :mod:`mmlong.bench`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mmlong.bench import table as preset
from mmlong.bench.contest import Conditions, Subject, against, run_contests
from mmlong.bench.layers import build as build_layer
from mmlong.bench.peers import PEERS, MissingPackageError, peers_of, require
from mmlong.bench.process import Job, run_job
from mmlong.bench.report import BadReportError, Report, growth_lines, machine_line, plot, stream_table, table
from mmlong.bench.rows import growths
from mmlong.cli.console import wide_console
from mmlong.cli.errors import CommandError
from mmlong.cli.mixer_words import mixer_names, mixer_options
from mmlong.measure.machine import DTYPES, describe
from mmlong.measure.memory import available_bytes
from mmlong.mixers import MIXERS, list_mixers, require_streaming
from mmlong.registry import nearest

MODES = ("forward", "both")
DIRECTIONS = ("causal", "alternate", "both")
COUNTED = """\
Of GEMM: useful floating-point operations (products, convolutions, attention, FFTs of the forward pass, three times with a backward; what is computed again does not count) over the fastest
product that this machine does. GB: the most that the process held above what it held before the inputs were made."""


def run_speed(what: str, argv: list[str]) -> int:
    """Run ``mmlong bench WHAT``; the exit status: 1 if nothing could be measured.

    Raises:
        CommandError: something is wrong with the command.
    """
    try:
        return WHAT[what](argv)
    except MissingPackageError as error:
        raise CommandError(str(error)) from error


def _parser(what: str, about: str, lengths: str | None = None) -> argparse.ArgumentParser:
    """What all that measure have in common."""
    parser = argparse.ArgumentParser(
        prog=f"mmlong bench {what}", description=about, epilog=COUNTED, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if lengths is not None:
        parser.add_argument(
            "--lengths", type=_numbers, default=_numbers(lengths), help=f"tokens, by commas (default {lengths})"
        )
    parser.add_argument("--rounds", type=_positive, default=2, help="processes of each side, in turn (default 2)")
    parser.add_argument("--repeats", type=_positive, default=2, help="timed runs in each process (default 2)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--max-memory", type=float, metavar="GB", help="that a process may take (CPU; default: what is free)"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds that a process may take")
    parser.add_argument("--peak-seconds", type=float, default=0.5, metavar="S",
                        help="on each of the machine's own peaks; 0: do not measure them")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 16384,65536") from None
    if low := [n for n in found if n < 1]:
        raise argparse.ArgumentTypeError(f"a length of {low[0]}: lengths are at least 1")
    return found


def _positive(text: str) -> int:
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}{nearest(word, known)}; known: {', '.join(known)}")
        return found

    return read


def _conditions(options: argparse.Namespace, **more: Any) -> Conditions:
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise CommandError("--device cuda: torch sees no CUDA device here")
    if options.threads < 0:
        raise CommandError(f"--threads {options.threads}: a number of threads, or 0")
    for flag, value in (("--max-memory", options.max_memory), ("--timeout", options.timeout)):
        if value is not None and value <= 0:
            raise CommandError(f"{flag} {value:g}: give a positive number")
    most = available_bytes() if options.max_memory is None else int(options.max_memory * 1e9)
    return Conditions(
        rounds=options.rounds, repeats=options.repeats, threads=options.threads, device=options.device, max_memory=most,
        timeout=options.timeout, **more,
    )  # fmt: skip


# What is measured


def _contests(options: argparse.Namespace, ffn: str | None) -> list[list[Subject]]:
    """Each mixer beside every peer asked for, or alone."""
    mixers = mixer_names(options.names, list_mixers())
    given = mixer_options(options.option, mixers, "measured")
    wanted = [] if ffn is not None or options.against is None else options.against
    peers = [name for mixer in mixers for name in peers_of(mixer)] if "all" in wanted else wanted
    for name in peers:
        if name not in PEERS:
            raise CommandError(
                f"no peer {name!r}{nearest(name, PEERS.names())}; peers: {', '.join(PEERS.names())}, or all"
            )
        if PEERS[name].mixer not in mixers:
            raise CommandError(f"peer {name} stands against {PEERS[name].mixer}, which is not measured; name it")
    if wanted and not peers:
        raise CommandError(f"no peer stands against {', '.join(mixers)}; `mmlong bench peers` lists them")
    made: list[list[Subject]] = []
    for mixer in mixers:
        mine = [name for name in peers if PEERS[name].mixer == mixer]
        if wrong := [name for name in mine if options.direction not in (None, PEERS[name].direction)]:
            raise CommandError(
                f"--direction {options.direction}: peer {wrong[0]} sees {PEERS[wrong[0]].direction} only"
            )
        made += [against(mixer, name, given[mixer]) for name in mine]
        if not mine:
            made.append([Subject(mixer, given[mixer], options.direction, ffn)])
    require([PEERS[name] for name in peers])
    _try([sides[0] for sides in made], options.dim)
    return made


def _try(subjects: Sequence[Subject], dim: int) -> None:
    """Build each of ours once, so that a wrong option is told now and not by every process. No peer is imported."""
    for subject in subjects:
        alone = subject
        if subject.peer is not None:
            peer = PEERS[subject.peer]
            alone = replace(subject, peer=None, options={**peer.options, **subject.options}, direction=peer.direction)
        try:
            build_layer(asdict(alone), dim)
        except (ValueError, TypeError) as error:
            raise CommandError(f"{subject.name} at dim {dim}: {error}") from error


def _layers(what: str, argv: list[str]) -> int:
    parser = _parser(what, {
        "mixers": "Time and memory of mixers, one layer each, beside other people's modules of the same mechanism.",
        "blocks": "Time and memory of blocks: mixer and feed-forward, each on a residual branch.",
    }[what], "16384,65536")  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="MIXER", help="name or shell pattern; default all")
    parser.add_argument("--dim", type=_positive, default=256)
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--dtype", type=_listed(tuple(DTYPES)), default=["fp32"], help="fp32,bf16 (autocast)")
    parser.add_argument(
        "--mode", type=_listed(MODES), default=["both"], help="forward (no graph), both (with backward)"
    )
    parser.add_argument("--direction", choices=DIRECTIONS, help="default: causal where the mixer has such a form")
    parser.add_argument("--option", action="append", default=[], metavar="[MIXER.]KEY=VALUE", help="of the mixers")
    parser.set_defaults(against=None)
    if what == "blocks":
        parser.add_argument("--ffn", default="swiglu", choices=["swiglu", "mlp", "none"])
    else:
        parser.add_argument("--against", type=lambda text: text.split(","), metavar="PEER[,PEER]|all")
        parser.add_argument("--peers-to", type=_positive, metavar="L", help="run peers up to this length only")
    options = parser.parse_args(argv)
    contests = _contests(options, options.ffn if what == "blocks" else None)
    conditions = _conditions(
        options, lengths=options.lengths, dim=options.dim, batch=options.batch, dtypes=options.dtype, modes=options.mode,
        peer_length=getattr(options, "peers_to", None),
    )  # fmt: skip

    def measure(report: Report, say: Callable[[str], None]) -> None:
        for row in run_contests(contests, conditions, run_job, say):
            report.rows.append(row)

    return _measured(["bench", what, *argv], options, conditions, measure)


def _models(argv: list[str]) -> int:
    from mmlong.bench.step import DEFAULT_DIM, DEFAULT_LENGTH, default_model, run_models
    from mmlong.cli.train import split_arguments

    parser = _parser(
        "models",
        "One training step (forward, backward, optimiser) of a recipe's model, on drawn data of the recipe's shapes.",
    )
    parser.usage = "mmlong bench models [-c RECIPE ...] [--KEY VALUE ...] [options]"
    parser.add_argument("--length", type=_positive, help="tokens of a row, where the recipe does not fix them")
    parser.add_argument("--batch", type=_positive, help="rows, in place of the recipe's")
    parser.add_argument("--dim", type=_positive, default=DEFAULT_DIM, help="of the default backbone, without -c")
    parser.add_argument("--dtype", type=_listed(tuple(DTYPES)), default=["fp32", "bf16"], help="fp32,bf16 (autocast)")
    options, rest = parser.parse_known_args(argv)
    names, overrides = split_arguments(rest)
    conditions = _conditions(options, lengths=[], dtypes=options.dtype)
    if names:
        model = recipe_model(names, overrides, options.batch, options.length)
    elif overrides:
        raise CommandError(f"{overrides[0]} is a key of a recipe: which? -c RECIPE")
    else:
        model = default_model(options.dim, options.length or DEFAULT_LENGTH)
        model["shape"]["batch"] = options.batch or 1

    def measure(report: Report, say: Callable[[str], None]) -> None:
        report.rows += run_models([model], conditions, run_job, say)

    return _measured(["bench", "models", *argv], options, conditions, measure)


def recipe_model(names: list[str], overrides: list[str], batch: int | None, length: int | None) -> Job:
    """A recipe's model, trainer options and shapes as plain values: what :func:`mmlong.bench.step.run_models` takes.

    Raises:
        CommandError: the recipe is wrong, or its rows have no length and none is given.
    """
    from mmlong.cli.build import build, parse
    from mmlong.cli.engine import describe_data
    from mmlong.cli.recipes import load_recipes, merge
    from mmlong.cli.train import check_config, hush, pairs
    from mmlong.datamodules.errors import DataError

    hush()
    config = load_recipes(names, overrides)
    check_config(config, overrides, " + ".join(names))
    try:
        parser, parsed = parse(config, overrides)
        data, task = build(parser, parsed)
        info = describe_data(data)
    except (DataError, ValueError) as error:
        raise CommandError(str(error), status=1) from error
    trainer = dict(config.get("trainer") or {})
    for key, value in pairs(overrides):
        if key.startswith("trainer."):
            trainer = merge(trainer, {key.removeprefix("trainer."): yaml.safe_load(value)})
    length = length or getattr(data, "length", None)
    if length is None and task.model.modality.tokens_per_sample() is None:
        raise CommandError(f"rows of {config['recipe']} are as long as its documents: how long? --length N")
    settings = {**parsed.model.as_dict()}
    settings["init_args"] = {**settings["init_args"], "data_info": info}
    kept = ("gradient_clip_val", "gradient_clip_algorithm", "max_steps")
    return {
        "name": str(config["recipe"]),
        "task": json.loads(json.dumps(settings)),
        "trainer": {key: trainer[key] for key in kept if key in trainer},
        "shape": {
            "batch": batch or int(getattr(data, "batch_size", 1)),
            "length": length,
            "streamed": getattr(data, "windows", None) == "stream",
        },
    }


def _stream(argv: list[str]) -> int:
    from mmlong.bench.stream import run_streams

    parser = _parser("stream", "Microseconds a token, one token at a time, through a byte model with random weights.")
    # What grows takes longer with each token; it is measured where it is named.
    steady = [n for n in list_mixers(causal=True, streaming=True) if MIXERS[n].traits.state == "constant"]
    parser.add_argument(
        "names", nargs="*", metavar="MIXER", help="name or shell pattern; default all with a constant state"
    )
    parser.add_argument("--tokens", type=_positive, default=100_000)
    parser.add_argument("--window", type=_positive, default=1000, help="tokens that are averaged over")
    parser.add_argument("--dim", type=_positive, default=256)
    parser.add_argument("--depth", type=_positive, default=8)
    parser.add_argument("--option", action="append", default=[], metavar="[MIXER.]KEY=VALUE", help="of the mixers")
    parser.add_argument("--compile", action="store_true", help="and the compiled step beside it")
    options = parser.parse_args(argv)
    mixers = mixer_names(options.names, steady)
    given = mixer_options(options.option, mixers, "measured")
    for mixer in mixers:
        subject = Subject(mixer, given[mixer], "causal")
        _try([subject], options.dim)
        try:
            require_streaming(build_layer(asdict(subject), options.dim)[0], "one token at a time")
        except ValueError as error:
            raise CommandError(str(error)) from error
    conditions = _conditions(options, lengths=[])
    size = {
        "dim": options.dim,
        "depth": options.depth,
        "tokens": options.tokens,
        "window": min(options.window, options.tokens),
    }
    models = [{"name": Subject(m, given[m]).name, "mixer": m, "options": given[m], **size} for m in mixers]

    def measure(report: Report, say: Callable[[str], None]) -> None:
        report.streams += run_streams(models, conditions, options.compile, run_job, say)

    return _measured(["bench", "stream", *argv], options, conditions, measure)


def _table(argv: list[str]) -> int:
    from mmlong.bench.step import default_model, run_models

    parser = _parser(
        "table",
        "Our mixers against their peers, their growth, and the default backbone's training step, beside what was aimed at.",
    )
    parser.add_argument("preset", nargs="?", default="first", choices=list(preset.PRESETS), metavar="WHICH",
                        help=f"table: {', '.join(preset.PRESETS)} (default first)")  # fmt: skip
    parser.add_argument("--lengths", type=_numbers, help="tokens, by commas (default: the table's own)")
    parser.add_argument("--dim", type=_positive, default=preset.DIM)
    parser.add_argument(
        "--peers-to", type=_positive, metavar="L", help="run peers up to this length only (default: the table's own)"
    )
    options = parser.parse_args(argv)
    chosen = preset.PRESETS[options.preset]
    options.lengths = options.lengths or list(chosen.lengths)
    options.peers_to = options.peers_to or chosen.peer_length
    contests = preset.contests(chosen.aims)
    require([PEERS[side.peer] for sides in contests for side in sides if side.peer is not None])
    _try([sides[0] for sides in contests], options.dim)
    layers = _conditions(
        options, lengths=options.lengths, dim=options.dim, peer_length=options.peers_to, quadratic_length=chosen.at
    )
    steps = _conditions(options, lengths=[], dtypes=tuple(DTYPES))

    def measure(report: Report, say: Callable[[str], None]) -> None:
        for row in run_contests(contests, layers, run_job, say):
            report.rows.append(row)
        if chosen.step:
            report.rows += run_models([default_model(options.dim, min(options.lengths))], steps, run_job, say)

    return _measured(["bench", "table", *argv], options, steps, measure)


# What is said


def _measured(
    command: list[str], options: argparse.Namespace, conditions: Conditions,
    measure: Callable[[Report, Callable[[str], None]], None],
) -> int:  # fmt: skip
    """Measure between two looks at the machine itself; show, keep and draw what was found, also where the rest was interrupted."""
    for path in (options.json, options.plot):
        if path is not None and path.is_dir():
            raise CommandError(f"{path} is a folder; give a file")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = Report(["mmlong", *command], settings, describe(conditions.device, conditions.threads))
    console = Console(stderr=True, highlight=False)
    looked: list[dict[str, Any]] = []

    def look() -> None:
        if options.peak_seconds > 0:
            job = {
                "kind": "machine",
                **conditions.where(),
                "dtypes": list(conditions.dtypes),
                "seconds": options.peak_seconds,
            }
            looked.append(run_job(job))
            told = looked[-1].get("failed") or ", ".join(
                f"{key} {value / 1e9:,.1f} G/s" for key, value in looked[-1].items()
            )
            console.print(f"this machine: {told}", markup=False, soft_wrap=True)
            best: dict[str, float] = {}
            for found in looked:
                for key, value in found.items():
                    if key != "failed":
                        best[key] = max(value, best.get(key, 0.0))
            report.machine.update(peaks=best, peaks_measured=looked)

    stopped = False
    try:
        look()
        measure(report, lambda text: console.print(text, markup=False, soft_wrap=True))
        look()
    except KeyboardInterrupt:
        stopped = True
        print("interrupted; what was measured so far:", file=sys.stderr)
    _show(report)
    if options.json is not None:
        report.save(options.json)
        print(f"written: {options.json}")
    succeeded = any(row.best for row in report.rows) or any(not s.get("failed") for s in report.streams)
    if options.plot is not None and succeeded:
        plot(report, options.plot)
        print(f"drawn: {options.plot}")
    return 130 if stopped else 0 if succeeded else 1


def _show(report: Report) -> None:
    console = wide_console(170, highlight=False)
    console.print(shlex.join(report.command), markup=False)
    console.print(machine_line(report.machine), markup=False)
    if report.rows:
        console.print(table(report))
    if report.streams:
        console.print(stream_table(report.streams))
    for line in growth_lines(growths(report.rows)):
        console.print(line, markup=False)
    if report.command[2:3] == ["table"] and (said := preset.verdicts(report)):
        aims = Table(box=None, pad_edge=False)
        for column in ("what", "aimed at (on this machine)", "found", ""):
            aims.add_column(column)
        for what, aimed, found, holds in said:
            aims.add_row(what, aimed, found, "yes" if holds else "no")
        console.print(aims)
    for line in report.failures:
        console.print(f"failed: {line}", markup=False)


def _peers(argv: list[str]) -> int:
    argparse.ArgumentParser(
        prog="mmlong bench peers", description="Other people's modules of our mechanisms."
    ).parse_args(argv)
    made = Table(box=None, pad_edge=False)
    for column in ("peer", "against", "what", "sees", "same function", "package"):
        made.add_column(column)
    for name in PEERS.names():
        peer = PEERS[name]
        there = peer.package if peer.installed else f"{peer.package} (not installed: pip install {peer.package})"
        made.add_row(name, peer.mixer, peer.title, peer.direction, "yes" if peer.same else "no", there)
    wide_console(160).print(made)
    return 0


def _show_file(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mmlong bench show", description="The table of a saved report.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there")
    options = parser.parse_args(argv)
    try:
        report = Report.load(options.file)
        _show(report)
        if options.plot is not None:
            plot(report, options.plot)
    except BadReportError as error:
        raise CommandError(str(error), status=1) from error
    except ValueError as error:
        raise CommandError(f"{options.file}: {error}", status=1) from error
    return 0


WHAT: dict[str, Callable[[list[str]], int]] = {
    "mixers": lambda argv: _layers("mixers", argv),
    "blocks": lambda argv: _layers("blocks", argv),
    "models": _models,
    "stream": _stream,
    "table": _table,
    "peers": _peers,
    "show": _show_file,
}
