"""Films: what was coded without loss comes back, brightness alone, and what is none is refused in words."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.video_files import read_luma, shrunk

av = pytest.importorskip("av", reason='needs PyAV: pip install "mmlong[video]"')


def write_film(path: Path, frames: np.ndarray, codec: str, pix_fmt: str) -> None:
    """Frames ``(F, H, W)`` as the brightness of a film, without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], pix_fmt
        if codec == "libx264":
            stream.options = {"qp": "0"}
        for frame in frames:
            shown = av.VideoFrame(frames.shape[2], frames.shape[1], pix_fmt)
            for number, plane in enumerate(shown.planes):
                data = np.full((plane.height, plane.line_size), 128, np.uint8)
                if number == 0:
                    data[:, : plane.width] = frame
                plane.update(data.tobytes())
            container.mux(stream.encode(shown))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mkv", "ffv1", "gray"), ("b.mp4", "libx264", "yuv420p"), ("c.mkv", "ffv1", "yuv420p")],
)
def test_brightness_comes_back_to_the_bit(name: str, codec: str, pix_fmt: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 18, 34), dtype=np.uint8)  # rows that are padded in memory
    write_film(tmp_path / name, frames, codec, pix_fmt)
    assert np.array_equal(np.stack(list(read_luma(tmp_path / name))), frames)


def test_what_is_no_film(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no film at all")
    with pytest.raises(BadSampleError, match="x.mp4: cannot be decoded"):
        list(read_luma(tmp_path / "x.mp4"))
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(BadSampleError, match="sound.wav: has no video in it"):
        list(read_luma(tmp_path / "sound.wav"))


def test_without_a_decoder_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r'not installed: pip install "mmlong\[video\]"'):
        list(read_luma(tmp_path / "x.mp4"))


def test_a_smaller_frame_is_means_of_squares() -> None:
    frame = np.array(
        [[0, 1, 9, 9, 7], [1, 0, 9, 8, 7], [255, 255, 3, 4, 7], [255, 255, 4, 4, 7], [1, 1, 1, 1, 1]], np.uint8
    )
    assert shrunk(frame, 2).tolist() == [[1, 9], [255, 4]]
    assert np.array_equal(shrunk(frame, 1), frame)
