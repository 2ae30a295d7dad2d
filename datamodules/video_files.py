"""Video files to arrays of frames, decoded by PyAV (FFmpeg), which is imported when a file is read: the extra ``video``.

Only brightness is read, the plane that most films store as it is (Y of YUV): no conversion of colours, so what a lossless or a standard decoder gives is the same on every machine (H.264 says every bit of its output).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BadSampleError, DataError

INSTALL = 'pip install "mmlong[video]"'


def require_av() -> Any:
    """The module ``av``.

    Raises:
        DataError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError("av", f"decodes video files and is not installed: {INSTALL}") from error
    return av


def read_luma(file: Path) -> Iterator[np.ndarray]:
    """The frames of a film's first video stream in the order they are shown: uint8 ``(H, W)`` each.

    Raises:
        DataError: PyAV is not installed.
        BadSampleError: no video that can be decoded, or frames whose first plane is not 8-bit brightness.
    """
    av = require_av()
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise BadSampleError(file, "has no video in it")
            for frame in container.decode(video=0):
                if not frame.format.name.startswith(("yuv", "gray", "nv")) or frame.format.components[0].bits != 8:
                    raise BadSampleError(file, f"its frames are {frame.format.name}; 8-bit YUV or grey is read")
                plane = frame.planes[0]
                rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
                yield rows[: frame.height, : frame.width].copy()
    except av.error.FFmpegError as error:
        raise BadSampleError(file, f"cannot be decoded: {error}") from error


def shrunk(frame: np.ndarray, factor: int) -> np.ndarray:
    """A frame at ``1 / factor`` of its size, each pixel the rounded mean of a square; rows and columns that fill none are left out."""
    height, width = (n // factor for n in frame.shape)
    squares = frame[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return ((squares.sum((1, 3), dtype=np.uint32) + factor**2 // 2) // factor**2).astype(np.uint8)
