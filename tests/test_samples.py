"""What a batch of raw tensors becomes as files: of videos, and of what is of no known kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from mmlong.midi import variable_length
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


def test_music_is_midi(tmp_path: Path) -> None:
    """Read back byte by byte, as the standard has it."""
    voices = [[60, 128, 62, 129, 62, 62], [48] + [128] * 5]
    raw = torch.tensor([voices], dtype=torch.uint8)
    (file,) = write_samples(create_modality("music", 8, voices=2), raw, tmp_path)
    data = file.read_bytes()
    assert data[:14] == b"MThd" + bytes([0, 0, 0, 6, 0, 1, 0, 2, 0, 4])
    found, at = [], 14
    while at < len(data):
        assert data[at : at + 4] == b"MTrk"
        end, at, tick = at + 8 + int.from_bytes(data[at + 4 : at + 8], "big"), at + 8, 0
        events = []
        while at < end:
            tick, status, pitch, _, at = tick + data[at], *data[at + 1 : at + 4], at + 4
            events.append((tick, "end" if status == 0xFF else status & 0x90 == 0x90, status & 15, pitch))
        found.append(events)
    first, second = ([event[:2] + event[3:] for event in events] for events in found)
    assert first == [
        (0, True, 60), (2, False, 60), (2, True, 62), (3, False, 62), (4, True, 62), (5, False, 62), (5, True, 62), (6, False, 62), (6, "end", 47)
    ]  # fmt: skip
    assert second == [(0, True, 48), (6, False, 48), (6, "end", 47)]


def test_long_rests_in_midi() -> None:
    """A delta of more than seven bits, as in the standard's own examples."""
    for ticks, wanted in ((0, "00"), (127, "7f"), (128, "8100"), (8192, "c000"), (16383, "ff7f"), (16384, "818000")):
        assert variable_length(ticks).hex() == wanted
