"""Longer at use than in training: bits by position are the model's own, whatever the pieces; the command trains once, uses each way, and goes on where it was."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from mmlong.experiments.extension import __main__ as extension
from mmlong.experiments.extension.subjects import SUBJECTS

SMALL = {"data": "bible", "dim": 16, "depth": 1, "seed": 0, "train": 16, "factor": 4, "piece": 13, "rows": 2}


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Bytes of no package."""
    raw = torch.randint(256, (150,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(extension, "read", lambda name, split: raw)
    return raw


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_use_is_of_the_same_weights_and_alike_within_the_length_of_training(
    name: str, noise: torch.Tensor
) -> None:
    args = argparse.Namespace(**SMALL)
    trained = extension.build(args, SUBJECTS[name].mixer(16, 16)).eval()
    tokens, _ = trained.encode(noise[None, :64])
    whole, _ = extension.read_on(trained, tokens, 1000)
    pieces, sizes = extension.read_on(trained, tokens, 13, (16, 64))
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-4)
    assert len(sizes) == 2
    assert all(size > 0 for size in sizes)
    nats, count = trained.head.loss(trained(tokens)[0], tokens)
    assert float(whole.mean()) == pytest.approx(float(nats) / float(count) / 0.6931472, abs=1e-4)
    for use, spec in SUBJECTS[name].uses.items():
        model = extension.build(args, spec(16, 16, 4)).eval()
        model.load_state_dict(trained.state_dict())
        found, _ = extension.read_on(model, tokens, 13)
        if use == "window":
            torch.testing.assert_close(found[:, :16], whole[:, :16], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found, whole, atol=1e-4)


def test_bits_by_position() -> None:
    assert extension.edges(4, 16) == [4, 8, 16, 32, 64]
    assert extension.edges(4, 3) == [4, 8, 12]
    bits = torch.arange(12.0)[None]
    assert extension.by_position(bits, [4, 8, 12]) == [1.5, 5.5, 9.5]


@pytest.mark.usefixtures("noise")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rope", "s4d", "--train", "16", "--factor", "4", "--steps", "3", "--batch", "2", "--dim", "16", "--depth", "1",
             "--rows", "2", "--piece", "30", "--threads", str(torch.get_num_threads()), "--json", str(tmp_path / "f.json")]  # fmt: skip
    assert extension.main(words) == 0
    rows = json.loads((tmp_path / "f.json").read_text())
    assert [(row["name"], row["use"]) for row in rows] == [
        ("rope", "as trained"), ("rope", "window"), ("rope", "larger base"), ("s4d", "as trained"),
    ]  # fmt: skip
    for row in rows:
        assert row["ends"] == [16, 32, 64]
        assert len(row["bits"]) == len(row["difference"]) == 3
        assert row["difference"][0] == pytest.approx(0, abs=2e-3), "the first window is the same either way"
        assert all(5 < bits < 12 for bits in row["bits"])
    capsys.readouterr()
    assert extension.main([*words, "--markdown", str(tmp_path / "f.md")]) == 0
    assert capsys.readouterr().out == "", "what is there already is not trained again"
    lines = (tmp_path / "f.md").read_text().splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| rope | as trained | ")
    with pytest.raises(SystemExit):
        extension.main(["lokal"])
    with pytest.raises(SystemExit):
        extension.main([*words, "--rows", "3"])
