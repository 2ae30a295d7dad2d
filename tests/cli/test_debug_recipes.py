"""Every packaged recipe, at its debug size, through the command line: packs its data, trains, tests, and leaves what it promises."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mmlong.cli.recipes import load_recipes, main_recipes

Call = Callable[..., tuple[int, str]]

DIGITS = (
    Path(__file__).parents[3] / "shared" / "data" / "fsdd.tar"
)  # spoken digits come in no package: beside the checkout, or not at all


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One folder of packed data for all workers of the test run."""
    root = tmp_path_factory.getbasetemp().parent / "recipe-data"
    monkeypatch.setenv("MMLONG_DATA", str(root))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", main_recipes())
def test_debug_size(name: str, data: Path, tmp_path: Path, mmlong: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMLONG_RUN_DIR", raising=False)
    more = []
    if load_recipes([name])["data"]["init_args"]["dataset"].startswith("fsdd"):
        source = os.environ.get("MMLONG_FSDD") or (str(DIGITS) if DIGITS.is_file() else None)
        if source is None:
            pytest.skip(f"the Free Spoken Digit Dataset is neither at {DIGITS} nor named by MMLONG_FSDD")
        more = [f"--data.source_path={source}"]
    status, said = mmlong("fit", "-c", name, "-c", f"{name}.debug", *more)
    assert status == 0, said
    assert f"{name}.debug: test " in said
    (run,) = Path("runs", f"{name}.debug").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    metric = "test/bits" if name.endswith("_ar") else "test/accuracy"
    assert summary[metric] >= 0
    assert summary["tokens_per_second"] > 0
    assert (run / "model.safetensors").is_file()
    assert list(run.glob("samples*" if name.endswith("_ar") else "confusion.png"))
    if name.endswith("_ar"):
        made = list(run.glob("samples*"))
        status, said = mmlong("generate", str(run), "--out", "made")
        assert status == 0, said
        assert len(list(Path("made").iterdir())) == 1
        assert made
    else:
        status, said = mmlong("predict", "--ckpt_path", str(run), *more)
        assert status == 0, said
        assert (run / "predictions.csv").read_text().count("\n") > 1
