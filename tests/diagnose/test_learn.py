"""A cell is learned, asked and the same again; findings are kept; the command says what it did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmlong.cli import main
from mmlong.cli.errors import CommandError
from mmlong.cli.mixer_words import parse_mixer
from mmlong.diagnose import ORDERINGS, PROBES, Cell, Probe, Setting, learn
from mmlong.diagnose.cell import ask, learn_model, probe_model
from mmlong.diagnose.report import BadFindingsError, Findings, markdown, plot
from mmlong.mixers import MIXERS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Parity of short rows, learned for ten steps."""
    probe = replace(
        PROBES["parity"], train=({"length": 4, "modulus": 2},), rows=4, steps=10,
        tests={"6": {"length": 6, "modulus": 2}, "9": {"length": 9, "modulus": 2, "start": 4}},
    )  # fmt: skip
    monkeypatch.setitem(PROBES._entries, "tiny", probe)
    monkeypatch.setattr("mmlong.diagnose.cell.ASKED_TOKENS", 400)
    return probe


class Knows(nn.Module):
    """Answers parity, wrongly where the sum is 3."""

    def forward(self, codes: Tensor) -> Tensor:
        total = codes.cumsum(1)
        return nn.functional.one_hot(torch.where(total == 3, 0, total % 2), 2).float()


def test_asking_counts_right_answers(tiny: Probe) -> None:
    exact = ask(Knows(), replace(tiny, rows=200), ({"length": 2, "modulus": 2},), 0, 1)
    assert exact == 1.0
    rng = np.random.default_rng([0, 1])
    codes, answers = tiny.draw(rng, 200, length=6, modulus=2)
    expected = 1 - float((codes.cumsum(1) == 3).mean())
    assert ask(Knows(), replace(tiny, rows=200), ({"length": 6, "modulus": 2},), 0, 1) == pytest.approx(expected)
    assert answers.shape == (200, 6)


@pytest.mark.parametrize("mixer", ["mamba2", {"name": "local", "window": 3}])
def test_a_cell_is_the_same_again(tiny: Probe, mixer: Any) -> None:
    setting = Setting(mixer, "tiny", dim=8, depth=1)
    looks: list[tuple[int, int, float]] = []
    a, b = learn(setting, lambda *look: looks.append(look)), learn(setting)
    assert (a.steps, a.accuracy, a.loss, a.failed) == (b.steps, b.accuracy, b.loss, "")
    assert set(a.accuracy) == {"6", "9"}
    assert looks[-1][:2] == (10, 10)
    assert learn(replace(setting, seed=1)).loss != a.loss
    assert Cell.from_dict(json.loads(json.dumps(a.as_dict()))) == a


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of a row, which one step of a recurrence shows."""
    probe = replace(
        PROBES["compression"], train=({"length": 2},), tests={"2": {"length": 2}}, from_last=2, steps=400, lr=1e-2
    )
    monkeypatch.setitem(PROBES._entries, "two letters", probe)
    monkeypatch.setattr("mmlong.diagnose.cell.ASKED_TOKENS", 4000)
    found = learn(Setting("mamba2", "two letters", dim=32, depth=1))
    assert found.accuracy["2"] > 0.99
    assert found.steps < 400, "it ends where it is solved"
    monkeypatch.setitem(PROBES._entries, "two letters", replace(probe, patient=True))
    assert learn(Setting("mamba2", "two letters", dim=32, depth=1)).steps == 400, "longer ones are asked: it goes on"


def test_a_loss_that_is_no_number_is_told(tiny: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *args, **kwargs: torch.tensor(float("nan")))
    found = learn(Setting("mamba2", "tiny", dim=8, depth=1))
    assert found.failed == "the loss is nan at step 1"
    assert not found.accuracy


def test_orderings_name_what_there_is() -> None:
    for ordering in ORDERINGS:
        assert ordering.test in PROBES[ordering.probe].tests
        assert ordering.least > ordering.most
        for mixer in (*ordering.able, *ordering.unable):
            name = mixer.partition(":")[0]
            assert name in MIXERS, name


def test_orderings_are_checked() -> None:
    ordering = ORDERINGS[0]
    held = {ordering.able[0]: 1.0, ordering.able[1]: 0.2, ordering.unable[0]: 0.1}
    said = ordering.check(lambda mixer, probe, test: held.get(mixer))
    assert [holds for _, holds in said] == [True, False, True]
    assert "0.200" in said[1][0]


def test_findings_are_kept(tmp_path: Path) -> None:
    findings = Findings()
    for seed, value in enumerate((0.5, 0.7)):
        findings.add(Cell(Setting("mamba2", "parity", 64, seed=seed), {"40": value, "256": 0.5}, 3, 0.1, 1.0, 10))
    findings.add(Cell(Setting("mamba2", "parity", 32), {"40": 0.1, "256": 0.1}))
    findings.add(Cell(Setting({"name": "local", "window": 3}, "parity", 64), failed="no"))
    path = tmp_path / "deep" / "found.json"
    findings.save(path)
    again = Findings.load(path)
    assert again.cells == findings.cells
    assert again.mean("mamba2", "parity", "40") == pytest.approx(0.6), "of the greatest width"
    assert again.mean("local:window=3", "parity", "40") is None
    assert "| mamba2 | 64 | 60 ±10 | 50 |" in markdown(again)
    findings.add(Cell(Setting("mamba2", "parity", 64, scale=2.0), {"40": 0.9, "256": 0.5}))
    findings.add(Cell(Setting("mamba2", "parity", 64, depth=4), {"40": 0.8, "256": 0.5}))
    assert "| mamba2 | 64 | 60 ±10 | 50 |" in markdown(findings), "of what was trained otherwise nothing is mixed in"
    assert "| mamba2, 2 x the steps | 64 | 90 | 50 |" in markdown(findings)
    assert "| mamba2, depth 4 | 64 | 80 | 50 |" in markdown(findings)
    findings.add(Cell(Setting("mamba2", "parity", 64, lr=1e-3), {"40": 0.7, "256": 0.6}))
    assert "| mamba2, lr 0.001 | 64 | 70 | 60 |" in markdown(findings)
    assert [findings.mean("mamba2", "parity", test) for test in ("40", "256")] == [0.9, 0.6], "the best of the widest"
    plot(again, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert [holds for _, holds in again.published()] == [True], "mamba2 is not expected to solve parity"
    for text, why in (("{}", "holds no findings"), ('{"format": 9}', "format 9"), ("nonsense", "holds no findings")):
        path.write_text(text)
        with pytest.raises(BadFindingsError, match=why):
            Findings.load(path)


def test_the_command(tiny: Probe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    words = [
        "diagnose",
        "mamba2",
        "local:window=3",
        "--tasks",
        "tiny",
        "--dims",
        "8",
        "--depth",
        "1",
        "--json",
        str(found),
    ]
    assert main([*words, "--plot", str(tmp_path / "a.png"), "--markdown", str(tmp_path / "a.md")]) == 0
    out, err = capsys.readouterr()
    assert "local:window=3" in out
    assert "mamba2 / tiny / 8 x 1" in err
    assert (tmp_path / "a.png").exists()
    assert "| mamba2, depth 1 | 8 |" in (tmp_path / "a.md").read_text()
    assert main([*words, "--seeds", "2"]) == 0
    assert "2 of 4 cells are there already" in capsys.readouterr().err
    assert len(Findings.load(found).cells) == 4
    assert main(["diagnose", "--show", "--json", str(found)]) == 0
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which mixers?"),
        (["mamba"  "x2"], "is no mixer (did you mean 'mamba2'?)"),
        (["mamba2", "--tasks", "parrity"], "there is no task 'parrity' (did you mean 'parity'?)"),
        (["mamba2:chunk"], "options are written NAME:OPTION=VALUE"),
        (["mamba2", "--dims", "x"], "are no widths"),
        (["mamba2", "--seeds", "0"], "at least 1"),
        (["--show"], "which findings?"),
    ],
)  # fmt: skip
def test_wrong_commands(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_mixer_that_fails_is_a_failed_cell(tiny: Probe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "mamba2:headdim=7", "--tasks", "tiny", "--dims", "8", "--depth", "1"]) == 1
    assert "failed: mamba2:headdim=7" in capsys.readouterr().out


def test_mixers_with_options() -> None:
    assert parse_mixer("mamba2") == "mamba2"
    assert parse_mixer("mamba2:d_state=8,backend=portable") == {"name": "mamba2", "d_state": 8, "backend": "portable"}
    with pytest.raises(CommandError):
        parse_mixer("mamba2:=3")


def test_what_a_mixer_asks_for_itself_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its reconstruction trains a compressor, so without that loss nothing of it would move."""
    monkeypatch.setattr("mmlong.diagnose.cell.ASKED_TOKENS", 100)
    monkeypatch.setitem(PROBES._entries, "far_recall", replace(PROBES["far_recall"], tests={"> 16": {"length": 96, "near": 16}}))  # fmt: skip
    setting = Setting({"name": "compressive", "segment": 8, "memory": 8, "compressed": 8, "rate": 2}, "far_recall", dim=16, depth=1, scale=0.001)  # fmt: skip
    torch.manual_seed(0)
    before = dict(probe_model(setting).named_parameters())
    torch.manual_seed(0)
    _, model = learn_model(setting)
    after = dict(model.named_parameters())
    names = [name for name in after if "compress" in name]
    assert names
    assert all(not torch.equal(before[name], after[name]) for name in names)
