"""``mmlong bench data``: what a loader delivers is counted, and held against a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mmlong.datamodules.documents import jsonl_source
from mmlong.datamodules.pack_sequences import pack_sequences

from mmlong.cli.bench import run_bench
from mmlong.cli.errors import CommandError


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """A small recipe on forty texts of two classes."""
    lines = [json.dumps({"text": "x" * (20 + number), "label": "ab"[number % 2]}) for number in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    pack_sequences(jsonl_source(tmp_path / "t.jsonl"), tmp_path / "packed")
    return ["data", "-c", "text/news", "-c", "text/news.debug", f"--data.dataset={tmp_path / 'packed'}"]


def test_what_is_delivered_is_counted(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"tokens_per_second": 1000.0}))
    assert run_bench([*recipe, "--data.length", "16", "--seconds", "0.1", "--run", str(run)]) == 0
    said = capsys.readouterr().out
    found = re.search(
        r"delivers ([\d,]+) samples and ([\d,]+) tokens a second\n\(([\d,]+) batches in ([\d.]+) s, 0 w", said
    )
    assert found is not None
    samples, tokens, batches = (int(found[n].replace(",", "")) for n in (1, 2, 3))
    assert batches > 8  # more than an epoch: it goes on
    assert tokens == pytest.approx(16 * samples, abs=16)  # every text is longer than the crop
    times = re.search(r"took 1,000 tokens a second: the loader is ([\d,.]+) times as fast", said)
    assert times is not None
    assert float(times[1].replace(",", "")) == pytest.approx(tokens / 1000, rel=0.01, abs=0.1)


def test_wrong_commands(recipe: list[str], tmp_path: Path) -> None:
    for wrong, message in (
        (["model"], "there is no bench 'model' .did you mean 'models'.*there are: data, mixers"),
        (["data"], "which recipe"),
        ([*recipe, "--data.batch", "3"], "unknown key 'data.batch'"),
        ([*recipe, "--data.batch_size", "none"], "data.batch_size"),
        ([*recipe, "--data.batch_size", "99"], "training samples do not fill one global batch of 99"),
        ([*recipe, "--run", str(tmp_path)], "no finished run"),
        ([*recipe, "--seconds", "0"], "Give a positive number"),
        ([*recipe[:-1], f"--data.dataset={tmp_path}"], "is not a packed dataset"),
    ):
        with pytest.raises(CommandError, match=message):
            run_bench(wrong)
