"""Every packaged recipe, at its debug size, through the command line: packs its data, trains, tests, and leaves what it promises."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from mmlong.cli.recipes import load_recipes, main_recipes
from mmlong.mixers import list_mixers
from mmlong.training.metrics_csv import column, read_metrics

Call = Callable[..., tuple[int, str]]

DIGITS = (
    Path(__file__).parents[3] / "shared" / "data" / "fsdd.tar"
)  # spoken digits come in no package: beside the checkout, or not at all


def spoken_digits() -> str | None:
    """Where the Free Spoken Digit Dataset is, if it is."""
    return os.environ.get("MMLONG_FSDD") or (str(DIGITS) if DIGITS.is_file() else None)


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
    if "fsdd" in json.dumps(load_recipes([name])["data"]):
        if (source := spoken_digits()) is None:
            pytest.skip(f"the Free Spoken Digit Dataset is neither at {DIGITS} nor named by MMLONG_FSDD")
        more = [f"--data.source_path={source}"]
    status, said = mmlong("fit", "-c", name, "-c", f"{name}.debug", *more)
    assert status == 0, said
    assert f"{name}.debug: test " in said
    (run,) = Path("runs", f"{name}.debug").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    joint, draws = name.startswith("joint/"), name.endswith("_ar") or name.startswith("joint/")
    metric = "test/bits" if draws else "test/accuracy"
    assert summary[metric] >= 0
    assert summary["tokens_per_second"] > 0
    assert (run / "model.safetensors").is_file()
    assert list(run.glob("samples*" if draws else "confusion.png"))
    if draws:
        made = list(run.glob("samples*"))
        speaks = []
        if joint:
            speaks = ["--as", list(json.loads((run / "config.json").read_text())["modalities"])[-1], "--length", "32"]
        status, said = mmlong("generate", str(run), "--out", "made", *speaks)
        assert status == 0, said
        assert len(list(Path("made").iterdir())) == 1
        assert made
    else:
        status, said = mmlong("predict", "--ckpt_path", str(run), *more)
        assert status == 0, said
        assert (run / "predictions.csv").read_text().count("\n") > 1


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", "local", "mamba2", "s4d", "hyena"])
def test_another_mixer_is_one_word_on_the_command_line(
    mixer: str, data: Path, tmp_path: Path, mmlong: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipes: dict[str, list[str]] = {"text/news": []}
    if (source := spoken_digits()) is not None:
        recipes["audio/digits8k"] = [f"--data.source_path={source}"]
    for name, more in recipes.items():
        steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_test_batches=1"]
        status, said = mmlong(
            "fit", "-c", name, "-c", f"{name}.debug", f"--model.backbone.mixers=[{mixer}]", *steps, *more
        )
        assert status == 0, said
        (run,) = Path("runs", f"{name}.debug").iterdir()
        assert json.loads((run / "config.json").read_text())["backbone"]["mixers"] == [mixer]


def trained(mmlong: Call, name: str, mixer: str, steps: int, metric: str, *more: str) -> list[float]:
    """What a recipe's debug size with another mixer says of each step."""
    short = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--trainer.limit_test_batches=1"]
    quick = ["--model.optim.warmup=4", "--model.optim.lr=0.01", "--model.optim.ema=0", *more]
    status, said = mmlong(
        "fit", "-c", name, "-c", f"{name}.debug", f"--model.backbone.mixers=[{mixer}]", *short, *quick
    )
    assert status == 0, said
    (run,) = Path("runs", f"{name}.debug").iterdir()
    return list(column(read_metrics(run / "metrics.csv"), metric)[1])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", list_mixers(streaming=True))
def test_bytes_are_learned_with_every_mixer(
    mixer: str, data: Path, tmp_path: Path, mmlong: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bits = trained(mmlong, "text/stdlib_ar", mixer, 48, "train/bits", "--model.samples=0")
    first, last = fmean(bits[:4]), fmean(bits[-4:])
    assert last < first - 1, f"{mixer}: from {first:.2f} to {last:.2f} bits a byte"


@pytest.mark.slow
@pytest.mark.parametrize("mixer", sorted({*list_mixers()} - {*list_mixers(streaming=True)}))
def test_digits_are_learned_with_every_mixer_that_sees_both_sides(
    mixer: str, data: Path, tmp_path: Path, mmlong: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixel by pixel, the grid with them: the loss falls."""
    monkeypatch.chdir(tmp_path)
    losses = trained(mmlong, "image/mnist784", mixer, 40, "train/loss", "--data.batch_size=16")
    first, last = fmean(losses[:8]), fmean(losses[-8:])
    assert last < first - 0.02, f"{mixer}: from {first:.3f} to {last:.3f}"
