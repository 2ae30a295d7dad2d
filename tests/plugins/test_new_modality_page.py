"""docs/new_modality.md as a reader meets it: every block of code runs, in turn, in one folder and one environment."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "new_modality.md"


def blocks() -> list[tuple[str, str]]:
    """(language, code) of each block of the page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.mark.slow
def test_every_block_runs(environment: Any) -> None:
    said = [getattr(environment, language)(code) for language, code in blocks()]
    made, checked, tested, _, packed = said
    assert "mmlong-sonar/mmlong_sonar/modality.py" in made
    assert "sonar/waves.debug: test accuracy" in made
    assert "round trip" in checked
    assert re.search(r"\d+ passed", tested)
    assert "packed: whole; train 12, val 4, test 8 samples" in packed
    assert "sonar/pings: test accuracy" in packed
    (run,) = (environment.away / "runs" / "sonar" / "pings").iterdir()
    assert json.loads((run / "config.json").read_text())["modality"] == {"name": "sonar", "channels": 2}


def test_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:mmlong|datamodules|tests)/[\w/]+\.py)`", PAGE.read_text("utf-8"))
    assert len(named) >= 6
    for name in named:
        assert (ROOT / name).is_file(), name
    assert {language for language, _ in blocks()} == {"bash", "python"}
