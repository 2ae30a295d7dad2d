"""The parts of tests/environments.py that need no network: what the lowest bounds are, which Pythons count. The environments themselves take gigabytes and are made by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).with_name("environments.py")


@pytest.fixture(scope="module")
def environments() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environments", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["environments"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_lowest_bounds_are_those_written(environments: ModuleType) -> None:
    assert environments.lowest(["torch>=2.11", "lightning>=2.6.6,<3", "jsonargparse[signatures]>=4.39,<5"], "3.11") == [
        "torch==2.11", "lightning==2.6.6", "jsonargparse==4.39",
    ]  # fmt: skip
    assert environments.lowest(["numpy>=2; python_version < '3.13'", "numpy>=2.1; python_version >= '3.13'"], "3.13") == ["numpy==2.1"]  # fmt: skip
    for wrong in ("torch", "torch<3"):
        with pytest.raises(ValueError, match="has 0 lower bounds"):
            environments.lowest([wrong], "3.11")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_can_be_tried_at_its_lowest(environments: ModuleType, python: str) -> None:
    dependencies = environments.project()["dependencies"]
    pinned = environments.lowest(dependencies, python)
    names = [environments.canonical(pin.partition("==")[0]) for pin in pinned]
    assert len(names) == len(set(names)), "one bound a dependency"
    assert {"torch", "lightning", "numpy", "pillow"} <= set(names)


def test_pythons_are_found_by_their_version(environments: ModuleType) -> None:
    version = "{}.{}".format(*sys.version_info)
    assert environments.pythons([sys.executable]) == {version: Path(sys.executable)}
