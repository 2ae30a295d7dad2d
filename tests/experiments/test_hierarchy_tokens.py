"""What a drawn token costs: models of bytes take turns, others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmlong.experiments.hierarchy import tokens

from mmlong.models import build_model
from mmlong.models.saving import save_model


def saved(folder: Path, modality: str) -> str:
    """A small causal model with random weights."""
    backbone = {"dim": 8, "depth": 1, "mixers": ["min_gru"], "direction": "causal"}
    save_model(build_model({"kind": "autoregressive", "modality": {"name": modality}, "backbone": backbone}), folder)
    return str(folder)


def test_models_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = saved(tmp_path / "one", "text"), saved(tmp_path / "two", "text")
    (tmp_path / "read").write_bytes(b"In the beginning")
    assert tokens.main([one, two, "--prompt", str(tmp_path / "read"), "--tokens", "2", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [one, two]
    assert all(float(line.split()[1]) > 0 for line in lines)


def test_models_of_other_things_and_empty_prompts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "read").write_bytes(b"")
    with pytest.raises(SystemExit):
        tokens.main([saved(tmp_path / "dna", "genome")])
    assert "no model that draws bytes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tokens.main([saved(tmp_path / "text", "text"), "--prompt", str(tmp_path / "read")])
    assert "is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tokens.main([str(tmp_path / "nothing")])
    assert "holds no saved model" in capsys.readouterr().err
