"""Every mixer is held against an oracle, and the table says what its tests found."""

from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
from mmlong.experiments.oracles import __main__ as command
from mmlong.experiments.oracles.collect import Row, marked, read


def test_every_mixer_has_an_oracle() -> None:
    """One that nobody has held against anything fails here."""
    found = marked()
    assert set(command.house()) <= set(found)
    words = {oracle.partition(":")[0] for oracles in found.values() for oracle in oracles}
    assert words <= {*command.PACKAGES, "definition"}, "the table names the version of each"
    assert found["mamba"] == [
        "definition: token by token",
        "transformers: MambaMixer",
        "mambapy: MambaBlock",
    ]


def report(folder: Path, *found: dict[str, object]) -> Path:
    """A JUnit report of tests with these properties."""
    cases = "".join(
        f"<testcase><properties><property name='oracle' value={quoteattr(json.dumps(f))}/></properties></testcase>"
        for f in found
    )
    path = folder / "report.xml"
    path.write_text(f"<testsuites><testsuite><testcase/>{cases}</testsuite></testsuites>")
    return path


def test_the_largest_difference_of_a_row_is_kept(tmp_path: Path) -> None:
    key = {"mixer": "gla", "oracle": "fla: naive", "dtype": "float32"}
    path = report(
        tmp_path,
        {"mixer": "gla", "oracle": "definition: token by token", "dtype": "float64", "output": [[1e-15, 1.0]]},
        {**key, "output": [[1e-7, 2.0]], "state": [[2e-7, 3.0], [1e-6, 4.0]]},
        {**key, "output": [[3e-7, 1.0]], "state": [], "gradient": [[float("nan"), 1.0]]},
        {**key, "output": [[2e-7, 5.0]]},
    )
    theirs, ours = read(path)
    assert (theirs.ours, ours.ours) == (False, True)
    assert theirs.tests == 3
    assert theirs.worst["output"] == (3e-7, 1.0)
    assert theirs.worst["state"] == (1e-6, 4.0)
    assert theirs.worst["gradient"][0] != theirs.worst["gradient"][0], "what is not a number is never smaller"
    assert command.table([theirs, ours]).splitlines()[2:] == [
        "| `gla` | fla: naive | float32 | 3.0e-07 of 1 | 1.0e-06 of 4 | nan of 1 |",
        "|  | definition: token by token | float64 | 1.0e-15 of 1 |  |  |",
    ]


def test_what_no_row_shows_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "house", lambda: ["gla", "mamba"])
    every = {q: (0.0, 1.0) for q in ("output", "state", "gradient")}
    rows = [Row("gla", "fla: naive", "float32", {"output": (0.0, 1.0)}), Row("mamba", "mambapy: m", "float32", every)]
    assert command.missing(rows) == ["gla: no test marked oracle shows its state, gradient"]
    monkeypatch.setattr(command, "run", lambda path: 0)
    monkeypatch.setattr(command, "read", lambda path: rows)
    assert command.main(["--out", str(tmp_path / "t.md")]) == 1
    assert not (tmp_path / "t.md").exists()
    rows.append(Row("gla", "definition: token by token", "float64", every))
    assert command.main(["--out", str(tmp_path / "t.md")]) == 0
    assert "`mamba` | mambapy: m | float32 | 0.0e+00 of 1" in (tmp_path / "t.md").read_text()


def test_an_oracle_is_of_a_known_package() -> None:
    with pytest.raises(ValueError, match="unknown packages: keras; known: torch, "):
        command.versions([Row("gla", "keras: GLA", "float32")])
