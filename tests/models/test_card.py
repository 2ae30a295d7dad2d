"""The model card: what is known is there, what is not is left out or said to be unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmlong
from mmlong.models import Model, build_model, model_card
from mmlong.models.card import mixers_of

SUMMARY: dict[str, Any] = {
    "recipe": "image/mine", "command": "mmlong fit -c image/mine", "weights": "best", "test/accuracy": 0.91, "test/loss": 0.3,
    "steps": 1200, "train_seconds": 63.5, "tokens_per_second": 12000, "peak_memory_bytes": 2**30, "device": "cpu", "ranks": 1, "threads": 2,
    "skipped_samples": 3, "data": {"name": "cells", "source": "a package", "licence": "CC BY 4.0", "classes": ["a", "b"]},
    "machine": {"processor": "Abacus 9", "cores": 2, "system": "Plan 9", "gpu": None}, "commit": "abc123+",
    "versions": {"python": "3.11", "mmlong": "0.0.9", "torch": "2.11"},
}  # fmt: skip
CONFIG = {
    "seed_everything": 7,
    "model": {
        "class_path": "mmlong.tasks.ClassifyTask",
        "init_args": {"optim": {"name": "adamw", "lr": 0.01, "ema": 0.98, "betas": None}, "backbone_from": None},
    },
    "data": {"class_path": "x.Y", "init_args": {"dataset": "/home/me/cells", "batch_size": 8}},
    "recipe": "image/mine",
}


@pytest.fixture(scope="module")
def model() -> Model:
    return build_model({
        "modality": {"name": "image", "size": [8, 8]}, "backbone": {"dim": 8, "depth": 1, "mixers": ["s4d"], "direction": "both"},
        "head": {"name": "classify", "num_classes": 2},
    })  # fmt: skip


def run_of(folder: Path, summary: dict[str, Any] | None, config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def head_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card[4:].partition("---")[0])


def test_everything_that_a_run_wrote_down(model: Model, tmp_path: Path) -> None:
    card = model_card(model, run_of(tmp_path, SUMMARY), license="mit")
    assert head_of(card) == {
        "library_name": "mmlong", "license": "mit", "pipeline_tag": "image-classification", "tags": ["mmlong", "image", "s4d"],
    }  # fmt: skip
    for line in (
        "# image/mine", "- reads: image (size [8, 8]), 64 tokens a sample", "- command: `mmlong fit -c image/mine`", "- steps: 1,200",
        "- batch size: 8", "- seed: 7", "- optimiser: name adamw, lr 0.01, ema 0.98", "- weights: best, averaged over training (decay 0.98)",
        "- time: 63.5 s", "- dataset: cells", "- from: a package", "- licence of the data: CC BY 4.0", "- classes: a, b",
        "- damaged samples were skipped 3 times", "| accuracy | 0.91 |", "| loss | 0.3 |", "- processor: Abacus 9", "- peak memory: 1.00 GiB",
        "- versions: python 3.11, mmlong 0.0.9, torch 2.11", "- commit of mmlong: abc123+", f"- card written by: mmlong {mmlong.__version__}",
        f"- parameters: {sum(p.numel() for p in model.parameters()):,}",
    ):  # fmt: skip
        assert line in card.splitlines(), line
    assert "None" not in card.partition("## Training")[2]
    assert "GPU" not in card
    assert "/home/me" not in card


def test_what_a_run_did_not_write_down_is_not_invented(model: Model, tmp_path: Path) -> None:
    card = model_card(
        model, run_of(tmp_path, {"recipe": "image/old", "steps": 5, "versions": {"mmlong": "0.0.1"}}, None)
    )
    assert "license" not in head_of(card)
    for line in (
        "- dataset: unknown",
        "- from: unknown",
        "- licence of the data: unknown",
        "- commit of mmlong: unknown",
        "- steps: 5",
    ):
        assert line in card.splitlines(), line
    assert "Not tested, or the run did not keep what came out." in card
    for absent in ("command", "seed", "optimiser", "processor", "| metric |", "weights:"):
        assert absent not in card, absent
    alone = model_card(model)
    assert head_of(alone) == head_of(card)
    assert "## Training" not in alone
    assert "## Data" not in alone


def test_a_test_of_some_batches_says_so(model: Model, tmp_path: Path) -> None:
    assert "On the test split:" in model_card(
        model, run_of(tmp_path, SUMMARY, {"trainer": {"limit_test_batches": 1.0}})
    )
    card = model_card(model, run_of(tmp_path, SUMMARY, {"trainer": {"limit_test_batches": 4}}))
    assert "On the test split, of which `limit_test_batches` 4 were read:" in card


def test_the_data_s_name_of_an_old_run_is_its_folder_s(model: Model, tmp_path: Path) -> None:
    assert "- dataset: cells\n- from: unknown" in model_card(model, run_of(tmp_path, {"recipe": "image/old"}))


def test_no_run_and_damaged_runs(model: Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no run folder: it has neither summary\.json nor config\.yaml"):
        model_card(model, tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json is damaged"):
            model_card(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        model.save_pretrained(tmp_path / "out", run=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_card_is_written_over_for_a_run_only(model: Model, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", SUMMARY)
    model.save_pretrained(tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    assert sorted(path.name for path in card.parent.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card.write_text("mine")
    model.save_pretrained(tmp_path / "out")
    assert card.read_text() == "mine"
    model.save_pretrained(tmp_path / "out", run=run, license="mit")
    assert card.read_text() == model_card(model, run, "mit")


def test_what_it_is_for() -> None:
    def kind_of(modality: str, head: dict[str, Any], **more: Any) -> dict[str, Any]:
        return head_of(model_card(build_model({
            "modality": {"name": modality}, "backbone": {"dim": 8, "depth": 1, "mixers": ["s4d"]}, "head": head, **more,
        })))  # fmt: skip

    assert kind_of("text", {}, kind="autoregressive") == {
        "library_name": "mmlong", "pipeline_tag": "text-generation", "tags": ["mmlong", "text", "autoregressive", "s4d"],
    }  # fmt: skip
    # The hub has no word for it.
    assert "pipeline_tag" not in kind_of("genome", {"name": "classify", "num_classes": 2})
    assert "pipeline_tag" not in kind_of("text", {"name": "tag", "num_classes": 2})


def test_names_of_mixers_however_a_backbone_is_written() -> None:
    parts = [
        "mamba2 x 2",
        ["pool 4", [{"name": "local", "window": 8}, "s4d x 4"], "up"],
        {"within": 8, "parts": ["attention"]},
        "mamba2",
    ]
    assert mixers_of({"parts": ["mamba2", ["pool 2", ["s4d"]]], "mixers": []}) == ["mamba2", "s4d"]
    assert mixers_of({"parts": parts, "mixers": ["rwkv7"]}) == ["mamba2", "local", "s4d", "attention"]
    assert mixers_of({"parts": [], "mixers": [[{"name": "gla", "heads": 2}], ["s4d", "gla"]]}) == ["gla", "s4d"]
