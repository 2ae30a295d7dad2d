"""The survey's first table, and who says that it implements a row of it."""

from __future__ import annotations

import pytest

from mmlong.cli import main
from mmlong.mixers import MIXERS, Traits, list_mixers
from mmlong.mixers.survey import TABLE_1, implemented


def test_seventeen_systems_and_nobody_claims_another() -> None:
    names = [system.name for system in TABLE_1]
    assert len(set(names)) == 17
    claimed = {said for name in list_mixers() for said, _ in MIXERS[name].traits.survey}
    assert claimed <= set(names)
    assert {"Performer", "Linear Transformers"} <= claimed


def test_the_table_is_what_the_registry_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Claims(MIXERS["performer"]):  # type: ignore[misc]
        traits = Traits(paper="x", causal=False, bidirectional=True, note="a claim", survey=(("ETC", "globals=4"),))

    system = next(system for system in TABLE_1 if system.name == "ETC")
    before = {found.name for found in implemented(system)}
    monkeypatch.setitem(MIXERS._entries, "claims", Claims)
    assert {found.name for found in implemented(system)} == before | {"claims: globals=4"}
    assert main(["mixers", "--table1"]) == 0
    told = capsys.readouterr().out
    assert all(system.name in told for system in TABLE_1)
    row = next(line for line in told.splitlines() if "claims: globals=4" in line)
    assert "two-sided; a claim" in row
