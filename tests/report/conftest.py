"""A run folder as a run leaves it, written by hand, and a page taken apart."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

HOSTILE = "</pre><script>alert(1)</script>&amp;<img src=x onerror=alert(2)> \x00\x1b[31m \ud7ff é"
CONFIG = """\
seed_everything: 7
recipe: made/up
trainer: {max_steps: 60, accelerator: auto}
model:
  class_path: mmlong.tasks.ClassifyTask
  init_args: {backbone: {dim: 16, mixers: [s4d]}, optim: {lr: 0.002}}
data:
  class_path: mmlong.datamodules.images.ImageDataModule
  init_args: {dataset: made, augment: ["<b>bold</b>"]}
"""
CLASSES = ["cat", "<dog>", "bird & co"]


def write_run(folder: Path, finished: bool = True) -> Path:
    """A run of three classes: metrics of 60 steps, 30 predictions, examples of every kind of file."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in (30, 60):
        (folder / "checkpoints" / f"step={step}.ckpt").write_bytes(b"")
    (folder / "config.yaml").write_text(CONFIG)
    part = {"command": "mmlong fit -c made/up", "began": "2026-01-02T03:04:05Z", "from": None,
            "machine": {"device": "cpu", "processor": "A <Fast> One", "cores": 2, "threads": 1, "versions": {"numpy": "2"}, "commit": "abc+"}}  # fmt: skip
    recipe = {"trainer": {"max_steps": 100}, "model": {"init_args": {"backbone": {"dim": 16}, "optim": {"lr": 1e-3}}}}
    story = {"recipe": "made/up", "recipes": {"made/up": recipe}, "overrides": ["--model.optim.lr=2e-3", "--trainer.max_steps", "60"],
             "data": {"dataset_name": "made", "source": "drawn by <hand>", "licence": "CC0", "label": "label"}, "class_names": CLASSES,
             "task": "ClassifyTask", "parts": [part]}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(story))
    with open(folder / "metrics.csv", "w", newline="") as file:
        rows = csv.DictWriter(
            file,
            [
                "step",
                "train/loss",
                "train/learning_rate",
                "train/tokens_per_second",
                "val/loss",
                "val/accuracy",
                "epoch",
            ],
        )
        rows.writeheader()
        for step in range(60):
            row = {
                "step": step,
                "train/loss": 1 / (step + 1),
                "train/learning_rate": 0.002,
                "train/tokens_per_second": 1000 + step,
                "epoch": 0,
            }
            rows.writerow(row | ({"val/loss": 0.5, "val/accuracy": step / 60} if step % 20 == 19 else {}))
    with open(folder / "predictions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["index", "truth", "prediction", "probability"])
        for i in range(30):
            table.writerow(
                [i, CLASSES[i % 3], CLASSES[i % 3] if i < 24 else CLASSES[(i + 1) % 3], f"{0.5 + i / 60:.6f}"]
            )
    examples = folder / "examples"
    examples.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(examples / "00.png")
    soundfile.write(examples / "01-0.wav", np.zeros(80), 8000)
    (examples / "02-0.txt").write_text(HOSTILE)
    (examples / "03.fa").write_text(">03-0\nACGT\n")
    with open(examples / "examples.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "index", "truth", "prediction", "probability"])
        table.writerow(["00.png", 3, "cat", "cat", "0.9"])
        table.writerow(["01-0.wav", 4, "<dog>", "cat", "0.6"])
        table.writerow(["02-0.txt", 5, "bird & co", "<dog>", "0.5"])
        table.writerow(["03.fa", 6, "cat", "cat", "0.5"])
    (folder / "samples-0.txt").write_bytes(b"\xff\xfe made")
    if finished:
        summary = {"recipe": "made/up", "command": "mmlong fit -c made/up", "weights": "last", "test/loss": 0.4, "test/accuracy": 0.8, "steps": 60,
                   "train_seconds": 100.0, "train_cpu_seconds": 190.0, "command_seconds": 130.0, "tokens": 123456, "tokens_per_second": 1234,
                   "parameters": 4321, "peak_memory_bytes": 2**30, "device": "cpu", "ranks": 1, "threads": 1, "skipped_samples": 0,
                   "versions": {"python": "3.11", "mmlong": "0.1.0"}}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


VOID = {"meta", "img", "br", "hr", "link", "input"}


@dataclass
class Page(HTMLParser):
    """A page taken apart; ``feed`` it. Elements that do not nest are named in ``wrong``."""

    wrong: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    __hash__ = object.__hash__

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.wrong.append(f"<{tag}> has an attribute twice")
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> ends nothing")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


def parse(page: str) -> Page:
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    return parsed
