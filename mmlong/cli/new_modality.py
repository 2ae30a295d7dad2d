"""``mmlong new-modality``: a package of one modality, its test and a recipe, that keeps the contract and trains as it is written. docs/new_modality.md teaches it.

The modality that is written reads recordings of several channels, and its recipe learns waves that are drawn (`mmlong.datamodules.waves`), so that there is something that works to change. The package
registers both by entry points, as anybody's does.
"""

from __future__ import annotations

import argparse
import keyword
import re
from importlib.util import find_spec
from pathlib import Path

from mmlong.cli.errors import CommandError

PACKAGE = "mmlong_@NAME@"
FILES: dict[str, str] = {}

FILES["pyproject.toml"] = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "mmlong-@DASHED@"
version = "0.1.0"
description = "A modality of mmlong: @NAME@"
dependencies = ["mmlong"]

# By these mmlong finds the modality by name, and the recipes as @NAME@/...
[project.entry-points."mmlong.modalities"]
@NAME@ = "mmlong_@NAME@.modality"

[project.entry-points."mmlong.recipes"]
@NAME@ = "mmlong_@NAME@"

[tool.setuptools]
packages = ["mmlong_@NAME@"]

[tool.setuptools.package-data]
"mmlong_@NAME@" = ["*.yaml"]
"""

FILES[f"{PACKAGE}/__init__.py"] = '''\
"""A modality of mmlong and its recipes."""
'''

FILES[f"{PACKAGE}/modality.py"] = '''\
"""@NAME@ as a sequence: a token is what all channels are at one moment.

Say here what the raw data is, what a token is, and which paper this follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities import Modality, register_modality, row_layout


@register_modality("@NAME@")
class @CLASS@Modality(Modality):
    """Recordings of several channels.

    Args:
        dim: width D of the vectors for the backbone.
        channels: C, numbers of a moment.
    """

    kind = "@NAME@"
    unit = "moment"

    def __init__(self, dim: int, channels: int = 1) -> None:
        super().__init__(dim)
        self.channels = channels
        self.moment = nn.Linear(channels, dim)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """float32 ``(B, C, T)`` to tokens float32 ``(B, T, C)``; 0 past a row's length.

        Raises:
            TypeError: not float32.
            ValueError: another shape, lengths or resets that do not fit, or numbers that are not finite.
        """
        if raw.dtype != torch.float32:
            raise TypeError(f"@NAME@ is float32 (B, {self.channels}, T), got {raw.dtype}")
        if raw.ndim != 3 or raw.shape[1] != self.channels or raw.shape[2] < 1:
            raise ValueError(f"this model reads @NAME@ (B, {self.channels}, T) with T >= 1, got {tuple(raw.shape)}")
        layout, valid = row_layout(raw.shape[0], raw.shape[2], lengths, resets)
        tokens = (raw if valid is None else torch.where(valid[:, None], raw, 0)).transpose(1, 2)
        if not torch.compiler.is_exporting() and not bool(tokens.isfinite().all()):
            raise ValueError("@NAME@ has a number that is NaN or infinite")
        return tokens, layout

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Tokens ``(B, T, C)`` back to float32 ``(B, C, T)``."""
        return tokens.float().transpose(1, 2).contiguous()

    def values(self, tokens: Tensor) -> Tensor:
        """What tokens ``(B, T, C)`` are, wherever they stand: ``(B, T, D)``."""
        return self.moment(tokens.to(self.moment.weight.dtype))

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Forms worth checking."""
        return [{}, {"channels": 3}]

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Raw data as a batch of it may be: noise, rows of any length, documents that begin anywhere."""
        raw = torch.randn(batch, self.channels, length, generator=generator)
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        return raw, lengths, torch.rand(batch, length, generator=generator) < 0.1
'''

FILES[f"{PACKAGE}/waves.yaml"] = """\
# @NAME@: sines, squares and saws under noise, 40 to 96 moments of two channels, drawn: which of the three?
recipe: @NAME@/waves
data:
  class_path: mmlong.datamodules.arrays.ArrayDataModule
  init_args:
    dataset: waves # or a folder that `mmlong pack array` made
    batch_size: 32
    cache: true
model:
  class_path: mmlong.tasks.ClassifyTask
  init_args:
    modality: {name: @NAME@}
    backbone: {dim: 32, depth: 2, mixers: [mamba2], direction: alternate, ffn_ratio: 2.0}
    head: {name: classify}
    optim: {lr: 0.005, warmup: 20, ema: 0.95}
trainer:
  max_steps: 150
  val_check_interval: 50
  check_val_every_n_epoch: null
  gradient_clip_val: 1.0
"""

FILES[f"{PACKAGE}/waves.debug.yaml"] = """\
# The debug size of @NAME@/waves, a few steps: -c @NAME@/waves -c @NAME@/waves.debug
recipe: @NAME@/waves.debug
data:
  init_args: {batch_size: 8}
model:
  init_args:
    backbone: {dim: 16, depth: 1}
trainer:
  max_steps: 12
  val_check_interval: 6
  limit_val_batches: 2
  limit_test_batches: 4
  log_every_n_steps: 1
"""

FILES["test_@NAME@.py"] = '''\
"""@NAME@ keeps the contract of a modality, and its recipe trains."""

from __future__ import annotations

from pathlib import Path

import mmlong_@NAME@.modality
import pytest

from mmlong.cli import main
from mmlong.testing import MODALITY_PROPERTY_NAMES, check_modality

FOLDER = Path(mmlong_@NAME@.modality.__file__).parent


@pytest.mark.parametrize("prop", [name for name in MODALITY_PROPERTY_NAMES if name != "set"])
def test_contract(prop: str) -> None:
    assert check_modality("@NAME@", only=prop) == (prop,)


def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = [f"{FOLDER / 'waves.yaml'}", f"{FOLDER / 'waves.debug.yaml'}"]
    assert main(["fit", "-c", recipe[0], "-c", recipe[1], "--run_dir", "run"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
'''


def check_name(name: str) -> None:
    """Raise :class:`CommandError` unless a new modality can be called so."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise CommandError(
            f"{name!r} cannot name a modality: small letters, digits and underscores, a letter first, and no word of Python's, e.g. radar or point_cloud"
        )
    from mmlong.modalities import MODALITIES

    if name in MODALITIES:
        taken = MODALITIES[name]
        raise CommandError(
            f"the modality {name!r} is there already ({taken.__module__}.{taken.__qualname__}); choose another name"
        )
    if find_spec(f"mmlong_{name}") is not None:
        raise CommandError(f"a package mmlong_{name} is installed already; choose another name")


def write_modality(name: str, folder: Path) -> list[Path]:
    """Write the package of a new modality.

    Args:
        name: of the modality.
        folder: where to; made if needed.

    Returns:
        the files.

    Raises:
        CommandError: the name cannot be, or a file is there already: nothing is written then.
    """
    check_name(name)
    words = {
        "@NAME@": name,
        "@CLASS@": "".join(part.title() for part in name.split("_")),
        "@DASHED@": name.replace("_", "-"),
    }

    def filled(text: str) -> str:
        return re.sub("|".join(words), lambda found: words[found[0]], text)

    files = {folder / filled(path): filled(text) for path, text in FILES.items()}
    if there := [str(path) for path in files if path.exists()]:
        raise CommandError(f"{', '.join(there)} is there already; nothing was written: give another --folder")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror or error}", status=1) from error
    return list(files)


def run_new_modality(argv: list[str]) -> int:
    """``mmlong new-modality NAME [--folder DIR]``."""
    parser = argparse.ArgumentParser(
        prog="mmlong new-modality",
        description="Write a package of one modality, its test and a recipe, which keeps the contract and trains as it is written.",
    )
    parser.add_argument("name", metavar="NAME", help="of the modality, e.g. radar")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write it (default: ./mmlong-NAME)")
    args = parser.parse_args(argv)
    name = args.name
    folder = args.folder if args.folder is not None else Path(f"mmlong-{name.replace('_', '-')}")
    for path in write_modality(name, folder):
        print(path)
    print(
        f"\nnext: pip install -e {folder}\n      mmlong fit -c {name}/waves\n      python -m pytest {folder}\n"
        f"then change {folder / f'mmlong_{name}' / 'modality.py'} to read your data; docs/new_modality.md says how"
    )
    return 0
