"""What pages get from the registries when they are built, and the build."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmlong.backbone.forms import FORMS
from mmlong.cli.recipes import main_recipes
from mmlong.mixers import MIXERS, Mixer, list_mixers, register_mixer

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """docs/_ext/generated.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("mmlong_docs_generated", DOCS / "_ext" / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_place_is_filled(generated: ModuleType) -> None:
    places = [
        place
        for page in DOCS.rglob("*.md")
        for place in re.findall(r"<!-- generated: (.*?) -->", page.read_text("utf-8"))
    ]
    assert sorted(places) == sorted(generated.GENERATED)


def test_the_gallery_has_every_mixer(generated: ModuleType) -> None:
    text = generated.fill((DOCS / "mixers.md").read_text("utf-8"))
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", text, re.M | re.S))
    assert list(sections) == list_mixers()
    for name in list_mixers():
        traits = MIXERS[name].traits
        row = re.search(rf"^\| \[`{name}`\]\(#{name}\) \|(.*)\|$", text, re.M)
        assert row, name
        assert f"| {traits.state} | {traits.cost} |" in row[0]
        assert generated.linked(traits.paper) in sections[name]
        assert generated.plain(traits.note) in sections[name]


def test_a_new_mixer_is_in_it(generated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MIXERS, "_entries", {name: MIXERS[name] for name in list_mixers()})

    @register_mixer(
        "newest", paper="Somebody 2026, arXiv 2601.00001v2", note="as in the paper, but c_t * 2", cost="n^2"
    )
    class Newest(Mixer):
        """The newest of all: :class:`~mmlong.layout.Layout` and ``x * y``."""

        def __init__(self, dim: int, *, causal: bool = True, window: int = 7) -> None:
            super().__init__(dim, causal=causal)

    text = generated.mixers()
    entry = text[text.index("### newest") :].partition("\n### ")[0]
    assert "[arXiv 2601.00001v2](https://arxiv.org/abs/2601.00001v2)" in entry
    assert "The newest of all: `mmlong.layout.Layout` and ``x * y``." in entry
    assert r"Fidelity: as in the paper, but c\_t \* 2" in entry
    assert "Options: `window=7`." in entry


def test_forms_and_recipes_are_all_there(generated: ModuleType) -> None:
    assert re.findall(r"^### (\w+)$", generated.forms(), re.M) == FORMS.names()
    assert re.findall(r"^\| `([\w/]+)` \|", generated.recipes(), re.M) == main_recipes()


@pytest.mark.slow
def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'mmlong[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path / "html")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "arXiv 2405.21060" in (tmp_path / "html" / "mixers.html").read_text("utf-8")  # Mamba-2's paper
    assert "create_mixer" in (tmp_path / "html" / "api" / "mixers.html").read_text("utf-8")
