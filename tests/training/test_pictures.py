from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlong.training.pictures import draw_confusion, draw_curves, draw_predictions, smooth


def drawn(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.std() > 5, "the picture is empty"
    return pixels


def test_curves(tmp_path: Path) -> None:
    rows = [{"step": str(n), "train/loss": str(1 / (n + 1))} for n in range(20)]
    assert draw_curves(rows, tmp_path / "a.png", "t")
    without = drawn(tmp_path / "a.png")
    rows[9] |= {"val/loss": "0.5", "val/accuracy": "0.7"}
    assert draw_curves(rows, tmp_path / "b.png", "t")
    assert drawn(tmp_path / "b.png").shape[0] > without.shape[0]
    assert not draw_curves([], tmp_path / "c.png", "t")
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_confusion_and_predictions(channels: int, tmp_path: Path) -> None:
    draw_confusion(np.array([[5, 1], [0, 0]]), ["a", "b"], tmp_path / "c.png", "t")
    drawn(tmp_path / "c.png")
    images = [np.full((channels, 8, 8), 40 * n, np.uint8) for n in range(5)]
    draw_predictions(images, [0] * 5, [0, 1, 0, 0, 1], [0.9] * 5, ["a", "b"], tmp_path / "p.png", "t")
    drawn(tmp_path / "p.png")


def test_smoothing_is_unbiased_from_the_start() -> None:
    assert smooth([3.0] * 10, 5) == pytest.approx([3.0] * 10)
