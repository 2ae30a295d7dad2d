"""What README.md says of a mixer of one's own holds: its code runs as it stands there, is short, and keeps the contract."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlong.mixers import MIXERS, create_mixer, list_mixers
from mmlong.testing import PROPERTY_NAMES, check_mixer

README = Path(__file__).parents[1] / "README.md"
MOST_LINES = 60
SLOW = ("compile", "export")


def section(heading: str) -> str:
    """README's text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README.read_text("utf-8"), re.M | re.S)
    assert found, f"README.md has no section {heading!r}"
    return found[1]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def blocks() -> list[str]:
    return python_blocks(section("Your own mixer"))


@pytest.fixture
def registered(blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which README's mixer registers itself, for the time of a test."""
    monkeypatch.setattr(MIXERS, "_entries", {name: MIXERS[name] for name in list_mixers()})
    before = set(list_mixers())
    exec(compile(blocks[0], str(README), "exec"), {"__name__": "readme_example"})
    (name,) = set(list_mixers()) - before
    return name


def test_it_is_a_whole_mixer_in_few_lines(blocks: list[str]) -> None:
    mixer, check, pattern = blocks
    assert "PatternAttention" in pattern
    assert len(mixer.splitlines()) < MOST_LINES
    assert "from mmlong.ops." in mixer, "the example is to stand on an existing op"
    assert "..." not in mixer
    assert "check_mixer" in check


def test_it_keeps_the_contract(registered: str) -> None:
    wanted = [name for name in PROPERTY_NAMES if name not in SLOW]
    ran = check_mixer(registered, only=wanted, dims=(16,))
    assert set(ran) == set(wanted) - {"both sides"}, "the traits exclude what a causal, streaming mixer is held to"


@pytest.mark.slow
def test_the_check_runs_as_written(registered: str, blocks: list[str]) -> None:
    """Compilation and export too."""
    assert f'check_mixer("{registered}")' in blocks[1]
    exec(compile(blocks[1], str(README), "exec"), {"__name__": "readme_example"})


def test_a_pattern_is_a_mixer_in_fewer(blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MIXERS, "_entries", {name: MIXERS[name] for name in list_mixers()})
    exec(compile(blocks[2], str(README), "exec"), {"__name__": "readme_example"})
    wanted = ("causality", "pieces", "padding", "resets", "gradients", "segments", "state", "cost")
    options = {"window": 5, "first": 2, "heads": 2}
    assert set(check_mixer("window_and_first", options=options, only=wanted, dims=(16,), probed=63)) == set(wanted)


def test_it_is_what_it_says(registered: str) -> None:
    """The formula in its docstring, token by token."""
    torch.manual_seed(0)
    m: Any = create_mixer(registered, 8).double()
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    c, outputs = torch.zeros(2, 8, dtype=torch.float64), []
    for token in x.unbind(1):
        f, r = torch.sigmoid(m.gate_proj(token)).chunk(2, -1)
        c = f * c + (1 - f) * m.in_proj(token)
        outputs.append(r * torch.tanh(c) + (1 - r) * token)
    y, state = m(x)
    torch.testing.assert_close(y, torch.stack(outputs, 1))
    torch.testing.assert_close(state["c"], c)


def test_nothing_of_it_stays_registered() -> None:
    assert "sru" not in list_mixers()
