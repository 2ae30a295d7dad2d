"""What the tests marked ``oracle`` hold against what: collected without running them, or run and read from their reports.

A test says by ``@pytest.mark.oracle(whom, mixer)`` whom it holds a mixer against, and shows the outcomes to the fixture ``held`` of ``tests/mixers/conftest.py``, which leaves the largest differences among the test's properties, from where they reach the JUnit report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

QUANTITIES = ("output", "state", "gradient")


@dataclass
class Row:
    """The largest differences of one mixer from one oracle in one dtype.

    Attributes:
        mixer: its registered name.
        oracle: ``"package: what"``, or ``"definition: how"``.
        dtype: of the tokens.
        worst: quantity -> (largest difference, the largest value beside it); a quantity that no test compares is missing.
        tests: how many showed it.
    """

    mixer: str
    oracle: str
    dtype: str
    worst: dict[str, tuple[float, float]] = field(default_factory=dict)
    tests: int = 0

    @property
    def ours(self) -> bool:
        """Written here: the definition itself."""
        return self.oracle.startswith("definition")


def tests_folder() -> Path:
    """The tests of mixers, which are part of a checkout and of no wheel; raises ``FileNotFoundError``."""
    folder = Path(__file__).resolve().parents[2] / "tests" / "mixers"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: run this in a checkout of mmlong")
    return folder


def oracle_of(item: Any) -> tuple[str, str] | None:
    """Which mixer a collected test holds against whom, by its mark: ``oracle("fla: naive_recurrent_gsa", "gsa")``. Without the second, the mixer is the test's parameter
    ``name``, and the first may be a dict by its values.
    """
    mark = item.get_closest_marker("oracle")
    if mark is None:
        return None
    mixer = mark.args[1] if len(mark.args) == 2 else item.callspec.params["name"]
    whom = mark.args[0]
    return mixer, whom[mixer] if isinstance(whom, dict) else whom


def marked() -> dict[str, list[str]]:
    """Mixer -> whom the tests hold it against, by collecting them."""
    import pytest

    class Keep:
        def __init__(self) -> None:
            self.found: dict[str, list[str]] = {}

        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            for item in items:
                if (found := oracle_of(item)) is not None:
                    whom = self.found.setdefault(found[0], [])
                    if found[1] not in whom:
                        whom.append(found[1])

    keep = Keep()
    status = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *_arguments()], plugins=[keep])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest could not collect the tests marked oracle (exit status {int(status)})")
    return keep.found


def _arguments() -> list[str]:
    folder = tests_folder()
    return [str(folder), "--ignore", str(folder / "test_conformance.py"), "--rootdir", str(folder.parents[1])]


def run(report: Path) -> int:
    """Run the marked tests in a process of their own, their reports to ``report``; pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "oracle", f"--junitxml={report}", *_arguments()]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, cwd=tests_folder().parents[1], env=environment).returncode


def read(report: Path) -> list[Row]:
    """Rows of a JUnit report, by mixer, others' code before definitions, float32 before float64."""
    rows: dict[tuple[str, str, str], Row] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for entry in case.iter("property"):
            if entry.get("name") != "oracle":
                continue
            found = json.loads(entry.get("value", ""))
            key = (found["mixer"], found["oracle"], found["dtype"])
            row = rows.setdefault(key, Row(*key))
            row.tests += 1
            for quantity in QUANTITIES:
                for difference, size in found.get(quantity, []):
                    before = row.worst.get(quantity)
                    if before is None or not difference <= before[0]:
                        row.worst[quantity] = (difference, size)
    return sorted(rows.values(), key=lambda r: (r.mixer, r.ours, r.oracle, r.dtype))
