"""Every folder imports only from those above it in README's table of the house, at the top of a file or within a function; and the files beside the folders make no circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def parts() -> dict[str, list[Path]]:
    """The files of each folder of ``mmlong/``, and each file beside the folders."""
    house = ROOT / "mmlong"
    found = {
        folder.name: sorted(folder.rglob("*.py")) for folder in house.iterdir() if (folder / "__init__.py").is_file()
    }
    return found | {file.stem: [file] for file in house.glob("*.py") if not file.name.startswith("__")}


def imports(files: list[Path], known: set[str]) -> set[str]:
    """The parts that files import from; a relative import stays within its own folder."""
    dotted = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                dotted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                dotted |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {words[1] for name in dotted if (words := name.split("."))[0] == "mmlong" and words[1:2]} & known


def listed() -> list[str]:
    """Folders of ``mmlong/`` in the order of README's table."""
    table = (ROOT / "README.md").read_text("utf-8").rpartition("\n## The house\n")[2]
    return re.findall(r"`mmlong/(\w+)(?:/|\.py)`", table)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """What each part imports from."""
    found = parts()
    return {name: imports(files, set(found)) - {name} for name, files in found.items()}


def test_the_table_has_every_folder() -> None:
    assert len(set(listed())) == len(listed())
    assert set(listed()) == {name for name, files in parts().items() if len(files) > 1} | {"layout"}


def test_folders_import_from_those_above(graph: dict[str, set[str]]) -> None:
    order = listed()
    below = {name: graph[name] & set(order[order.index(name) :]) for name in order}
    assert {name: found for name, found in below.items() if found} == {}


def test_there_is_no_circle(graph: dict[str, set[str]]) -> None:
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_files_know_no_backbone() -> None:
    names = set(parts())
    assert imports(sorted((ROOT / "datamodules").rglob("*.py")), names) <= {"modalities", "layout"}
