"""What a batch of raw tensors becomes as files: of videos, and of what is of no known kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from mmlong.modalities import create_modality
from mmlong.samples import write_samples


def test_a_video_is_an_animation(tmp_path: Path) -> None:
    for channels in (1, 3):
        modality = create_modality("video", 8, size=[3, 4, 6], channels=channels)
        levels = torch.tensor([0, 100, 200], dtype=torch.uint8)
        raw = levels.view(1, 1, 3, 1, 1).expand(2, channels, 3, 4, 6)
        files = write_samples(modality, raw, tmp_path / str(channels))
        assert [file.name for file in files] == ["samples-0.gif", "samples-1.gif"]
        with Image.open(files[1]) as film:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
        assert [frame.shape for frame in frames] == [(4, 6, 3)] * 3
        assert [int(frame[0, 0, 0]) for frame in frames] == [0, 100, 200]


def test_what_has_no_file_of_its_own_is_an_array(tmp_path: Path) -> None:
    raw = torch.rand(2, 3, 5)
    (file,) = write_samples(create_modality("points", 8), raw, tmp_path, "clouds")
    assert file.name == "clouds.npy"
    assert np.array_equal(np.load(file, allow_pickle=False), raw.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["clouds.npy"]
