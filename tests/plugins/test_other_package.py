"""A package that is nobody's of this house: its mixer, modality, head and recipe are found by entry points, and train, without a line of mmlong changed."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from mmlong.cli import recipes

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "theirs"
version = "1.0"
[project.entry-points."mmlong.modalities"]
theirs = "their_parts.parts"
[project.entry-points."mmlong.mixers"]
theirs = "their_parts.parts"
[project.entry-points."mmlong.heads"]
theirs = "their_parts.parts"
[project.entry-points."mmlong.recipes"]
theirs = "their_parts.recipes"
[tool.setuptools]
packages = ["their_parts", "their_parts.recipes"]
[tool.setuptools.package-data]
"their_parts.recipes" = ["*.yaml"]
""",
    "their_parts/__init__.py": "",
    "their_parts/parts.py": '''\
"""Parts of somebody else's."""
import torch
from torch import nn

from mmlong.heads import register_head
from mmlong.heads.classify import ClassifyHead
from mmlong.mixers import register_mixer
from mmlong.mixers.cell import CellMixer
from mmlong.modalities import Modality, register_modality, row_layout
from mmlong.ops.scan import scan


@register_modality("their_steps")
class Steps(Modality):
    """What each channel gains from one moment to the next."""

    kind = "steps"

    def __init__(self, dim, channels):
        super().__init__(dim)
        self.channels = channels
        self.step = nn.Linear(channels, dim)

    def encode(self, raw, lengths=None, resets=None):
        layout, _ = row_layout(raw.shape[0], raw.shape[2], lengths, resets)
        return raw.diff(dim=2, prepend=torch.zeros_like(raw[..., :1])).transpose(1, 2), layout

    def decode(self, tokens, layout=None):
        return tokens.cumsum(1).transpose(1, 2)

    def values(self, tokens):
        return self.step(tokens)


@register_mixer("their_average", paper="nobody's", state="constant", cost="n")
class Average(CellMixer):
    """A moving average with a learned rate a channel."""

    def __init__(self, dim, *, causal=True):
        super().__init__(dim, causal=causal)
        self.rate = nn.Parameter(torch.linspace(-2, 3, dim))

    def state_bytes(self, length):
        return 4 * self.dim

    def mix(self, x, state, layout):
        f = torch.sigmoid(self.rate).expand_as(x)
        c, after = scan(f, (1 - f) * x, None if state is None else state["c"], layout)
        return c, {"c": after}


@register_head("their_head")
class Cautious(ClassifyHead):
    """A classifier that is never too sure."""

    def forward(self, x, layout=None):
        return 5 * torch.tanh(super().forward(x, layout) / 5)
''',
    "their_parts/recipes/__init__.py": "",
    "their_parts/recipes/recipe.yaml": """\
# waves by somebody else's parts
data:
  class_path: mmlong.datamodules.arrays.ArrayDataModule
  init_args: {dataset: waves, batch_size: 16, cache: true}
model:
  class_path: mmlong.tasks.ClassifyTask
  init_args:
    modality: {name: their_steps}
    backbone: {dim: 16, depth: 2, mixers: [their_average], direction: alternate}
    head: {name: their_head}
    optim: {lr: 0.01, warmup: 5}
trainer: {max_steps: 40, val_check_interval: 20, check_val_every_n_epoch: null, log_every_n_steps: 1}
""",
}


@pytest.mark.slow
def test_a_package_brings_a_mixer_a_modality_a_head_and_a_recipe(environment: Any) -> None:
    for name, text in FILES.items():
        path = environment.away / "theirs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    environment.bash("pip install --no-deps --no-build-isolation --no-index ./theirs && rm -r theirs")
    said = environment.bash("mmlong recipes 'theirs/*' && mmlong fit -c theirs/recipe")
    assert "theirs/recipe  waves by somebody else's parts" in said
    assert "theirs/recipe: test accuracy" in said
    (run,) = (environment.away / "runs" / "theirs" / "recipe").iterdir()
    config = json.loads((run / "config.json").read_text())
    parts = (config["modality"]["name"], config["backbone"]["mixers"], config["head"]["name"])
    assert parts == ("their_steps", ["their_average"], "their_head")
    assert json.loads((run / "summary.json").read_text())["test/accuracy"] > 0.5, "chance is a third"
    # In another process the run is found and read again.
    assert "predictions in" in environment.bash(f"mmlong predict --ckpt_path {run}")


def test_a_package_of_recipes_that_does_not_load_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "their_recipes" / "deep").mkdir(parents=True)
    (tmp_path / "their_recipes" / "__init__.py").touch()
    (tmp_path / "their_recipes" / "deep" / "one.yaml").write_text("# theirs\nmine: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("bad", "not_there_at_all", recipes.GROUP), EntryPoint("good", "their_recipes", recipes.GROUP)]
    monkeypatch.setattr(recipes.importlib.metadata, "entry_points", lambda group: points)
    with pytest.warns(
        UserWarning, match=r"recipes of plug-in bad \(not_there_at_all\) cannot be listed: .*a package, a folder"
    ):
        found = recipes.packaged()
    assert "good/deep/one" in found
    assert "image/mnist784" in found
    with pytest.warns(UserWarning, match="plug-in bad"):
        assert recipes.load_recipe("good/deep/one") == ("good/deep/one", {"mine": 1})
