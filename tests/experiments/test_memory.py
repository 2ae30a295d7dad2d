"""How far memories reach: the subjects are made, both commands run, prompts ask for what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mmlong.experiments.memory import needle, recall
from mmlong.experiments.memory.subjects import SUBJECTS

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.diagnose import PROBES, Probe
from mmlong.diagnose.probes import FAR_KEYS, FAR_VALUES, NOISE


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of two steps on short rows."""
    probe = PROBES["far_recall"]
    values = {
        **probe.__dict__,
        "train": ({"length": 128},),
        "tests": {"> 16": {"length": 96, "near": 16}},
        "steps": 2,
        "rows": 2,
    }
    monkeypatch.setitem(PROBES._entries, "far_recall", Probe(**values))
    monkeypatch.setattr("mmlong.diagnose.cell.ASKED_TOKENS", 128)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_is_causal_and_streams(name: str) -> None:
    subject = SUBJECTS[name]
    made = Backbone(
        BackboneConfig(
            dim=64, depth=2, **({"parts": subject["parts"]} if "parts" in subject else {"mixers": [subject]})
        )
    )
    assert made.causal
    assert made.streaming


def test_prompts_ask_for_what_they_hold() -> None:
    codes, values = needle.prompt(np.random.default_rng(0), 3, 500, 0.5)
    for line, said in zip(codes, values, strict=True):
        told = [code - NOISE - FAR_KEYS for code in line if code >= NOISE + FAR_KEYS]
        assert sorted(told) == [FAR_VALUES * key + value for key, value in enumerate(said)]
        assert min(np.flatnonzero(line >= NOISE)) >= 250
        assert list(line[-FAR_KEYS:]) == [NOISE + key for key in range(FAR_KEYS)]


@pytest.mark.usefixtures("short")
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["local", "recurrent_memory", "--json", str(tmp_path / "r.json")]
    assert recall.main([*words, "--plot", str(tmp_path / "r.png"), "--markdown", str(tmp_path / "r.md")]) == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "| recurrent_memory | 64 |" in (tmp_path / "r.md").read_text()
    capsys.readouterr()
    # What is there already is not learned again.
    assert recall.main(words) == 0
    assert capsys.readouterr().out == ""
    asked = ["deltanet", "--tokens", "200", "--depths", "0.1", "0.9", "--rows", "2", "--piece", "64"]
    asked += ["--weights", str(tmp_path / "kept")]
    assert needle.main([*asked, "--json", str(tmp_path / "n.json")]) == 0
    assert "learned in 2 steps" in capsys.readouterr().out
    # The kept model answers the same without being learned anew.
    assert needle.main([*asked, "--json", str(tmp_path / "again.json")]) == 0
    assert "learned" not in capsys.readouterr().out
    found = json.loads((tmp_path / "n.json").read_text())
    assert [one["depth"] for one in found] == [0.1, 0.9]
    assert [one["right"] for one in json.loads((tmp_path / "again.json").read_text())] == [
        one["right"] for one in found
    ]
    assert all(len(one["right"]) == 2 and one["state_mb"] > 0 for one in found)
    with pytest.raises(SystemExit):
        recall.main(["lokal"])
