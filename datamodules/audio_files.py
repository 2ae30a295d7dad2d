"""One rule for turning any sound file into the WAV that is packed, and for reading that WAV back by the stretch.

========================== =====================================================================================
what it is                 what happens
========================== =====================================================================================
8-, 16-bit, mu- and A-law  exact in 16 bits
24-, 32-bit integer        rounded to 16 bits, or kept as float32 where the dataset is stored as ``FLOAT``
float                      the same; a peak beyond full scale is refused for 16 bits, which would clip it
FLAC, OGG, AIFF, MP3, ...  whatever libsndfile reads, by the rules above
another rate               refused, unless resampling was asked for (`mmlong.datamodules.resample`)
stereo where mono is due   refused, unless mixing was asked for: the mean of the channels
empty, NaN, infinite       refused
cut short                  refused: a header that promises more than there is (WAV, AIFF, FLAC, AU, RF64, W64, CAF),
                           an OGG without its last page. A cut MP3 cannot be told from a short one
========================== =====================================================================================

A packed member is RIFF WAVE with a header of fixed size, so that samples ``start`` to ``stop`` are known bytes of it; its bytes are a function of the samples
alone. Rate, channels and sample type are the same in a whole dataset and stand in its ``dataset.json``.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from .codecs import Member
from .errors import BadSampleError
from .resample import resample

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".w64", ".rf64", ".caf", ".mp3"})  # fmt: skip
SUBTYPES = {"PCM_16": np.dtype("<i2"), "FLOAT": np.dtype("<f4")}
_HEADER = {"PCM_16": 44, "FLOAT": 58}
# libsndfile reads what is there of a file that was cut, and says so only in its log. The lengths of the whole file (RIFF, FORM) are left aside: many writers
# are off by a byte in them, and what counts is the chunk of samples. Sony's W64 logs nothing else.
_PROMISED = re.compile(r"^\s*(?:data|SSND|Data Size|riff)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_DS64 = re.compile(r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)")


@dataclass(frozen=True)
class Storage:
    """How the sounds of one dataset are stored, and what may be done to a file to get there.

    Attributes:
        rate: samples a second.
        channels: 1 or more.
        subtype: ``PCM_16`` or ``FLOAT``.
        resample: whether files of another rate are resampled; they are refused otherwise.
        mix: whether files of several channels are averaged to one where ``channels`` is 1; they are refused otherwise.
    """

    rate: int
    channels: int = 1
    subtype: str = "PCM_16"
    resample: bool = False
    mix: bool = False

    def __post_init__(self) -> None:
        if self.rate < 1 or self.channels < 1:
            raise ValueError(f"rate {self.rate} and channels {self.channels} must be at least 1")
        if self.subtype not in SUBTYPES:
            raise ValueError(f"sounds are stored as {' or '.join(SUBTYPES)}, not {self.subtype!r}")

    @classmethod
    def of(cls, about: dict[str, Any]) -> Storage:
        """What ``dataset.json`` says under ``audio``."""
        return cls(int(about["rate"]), int(about["channels"]), str(about["subtype"]))

    @property
    def about(self) -> dict[str, Any]:
        """For ``dataset.json``: rate, channels, subtype, resample, mix."""
        return asdict(self)

    @property
    def block(self) -> int:
        """Bytes that one moment of all channels takes."""
        return self.channels * SUBTYPES[self.subtype].itemsize

    @property
    def header(self) -> int:
        """Bytes of a packed member before its first sample."""
        return _HEADER[self.subtype]

    def frames(self, member: bytes) -> int:
        """Samples of each channel in a packed member."""
        return (len(member) - self.header) // self.block


@dataclass(frozen=True)
class Sound:
    """A sound file, read.

    Attributes:
        wave: float32 ``(C, T)``, full scale at -1 and 1.
        rate: samples a second.
        subtype: how the file held it, in libsndfile's words (``PCM_24``, ``ULAW``, ``VORBIS``, ...).
    """

    wave: np.ndarray
    rate: int
    subtype: str


def read_sound(source: Path | bytes, name: str | Path) -> Sound:
    """Read and check a sound file.

    Args:
        source: the file, or its bytes.
        name: to call it by in errors.

    Raises:
        BadSampleError: it is gone, no sound, empty, cut short, or holds NaN or infinite samples.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise BadSampleError(name, f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise BadSampleError(name, "is an empty file")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, rate, subtype, log = file.frames, file.samplerate, file.subtype, file.extra_info
            wave = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        reason = re.sub(r"^Error opening <.*?>: ", "", str(error)).rstrip(".: ")  # of bytes, and not of a file
        raise BadSampleError(name, f"cannot be read as a sound, or is cut short ({reason})") from error
    for short, whole in _shortfalls(log, promised, len(wave)):
        raise BadSampleError(
            name, f"is cut short: its header promises {whole:,} and there are {short:,}; copy it again"
        )
    if data[:4] == b"OggS" and not _ogg_ends(data):
        raise BadSampleError(name, "is cut short: its last page is missing or not whole; copy it again")
    if not len(wave):
        raise BadSampleError(name, "holds no samples")
    if not np.isfinite(wave).all():
        moment = int(np.flatnonzero(~np.isfinite(wave).all(1))[0])
        raise BadSampleError(name, f"holds NaN or infinite samples, the first at {moment:,} ({moment / rate:.3f} s)")
    return Sound(np.ascontiguousarray(wave.T), rate, subtype)


def _shortfalls(log: str, promised: int, found: int) -> list[tuple[int, int]]:
    """(how much there is, how much was promised) wherever it is less: bytes by the log, frames otherwise."""
    pairs = [(int(there), int(said)) for said, there in _PROMISED.findall(log)]
    pairs += [(int(there), int(said)) for there, said in _DS64.findall(log)]
    return [(there, said) for there, said in [*pairs, (found, promised)] if there < said]


def _ogg_ends(data: bytes) -> bool:
    """Whether the pages of an OGG (RFC 3533) are whole up to the one that is marked as the last of its stream."""
    at, last = 0, False
    while data[at : at + 4] == b"OggS" and len(data) >= at + 27:
        last = bool(data[at + 5] & 4)
        segments = data[at + 27 : at + 27 + data[at + 26]]
        at += 27 + data[at + 26] + sum(segments)
    return last and at <= len(data)


def survey(source: Path | bytes, name: str | Path) -> tuple[int, int]:
    """(rate, channels) of a sound file by its header alone.

    Raises:
        BadSampleError: it is no sound.
    """
    if isinstance(source, Path) and source.is_file() and not source.stat().st_size:
        raise BadSampleError(name, "is an empty file")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            return file.samplerate, file.channels
    except (soundfile.SoundFileError, RuntimeError, TypeError, OSError) as error:
        raise BadSampleError(name, "cannot be opened as a sound") from error


def conform(sound: Sound, storage: Storage, name: str | Path) -> np.ndarray:
    """A sound as its dataset stores it: float32 ``(C, T)`` of the right rate and channels.

    Raises:
        BadSampleError: it differs in a way that nobody asked to be changed.
    """
    wave = sound.wave
    if sound.rate != storage.rate and not storage.resample:
        raise BadSampleError(
            name, f"is at {sound.rate:,} Hz and {storage.rate:,} Hz is due; ask for resampling (--resample), or convert it first"
        )  # fmt: skip
    if len(wave) != storage.channels:
        if storage.channels != 1 or not storage.mix:
            raise BadSampleError(name, f"has {len(wave)} channels and {storage.channels} are due; ask for mixing to mono (--mono), or convert it first")  # fmt: skip
        wave = wave.mean(0, keepdims=True)
    peak = float(np.abs(wave).max())
    if peak > 1 and storage.subtype == "PCM_16":
        raise BadSampleError(
            name, f"peaks at {peak:.3f}, beyond full scale, which 16 bits would clip; store as FLOAT or turn it down"
        )
    try:
        return resample(wave, sound.rate, storage.rate)
    except ValueError as error:
        raise BadSampleError(name, str(error)) from error


def encode_wav(wave: np.ndarray, storage: Storage) -> bytes:
    """Float32 ``(C, T)`` as WAV bytes, rounded to 16 bits where they are stored so (16-bit sources exactly; beyond full scale clipped)."""
    dtype = SUBTYPES[storage.subtype]
    if storage.subtype == "PCM_16":
        wave = np.clip(np.rint(wave.astype(np.float64) * 32768), -32768, 32767)
    data = np.ascontiguousarray(wave.T, dtype).tobytes()
    block = storage.block
    code = 1 if storage.subtype == "PCM_16" else 3
    form = struct.pack("<HHIIHH", code, storage.channels, storage.rate, storage.rate * block, block, 8 * dtype.itemsize)
    chunks = struct.pack("<4sI", b"fmt ", len(form)) + form
    if (
        code == 3
    ):  # as the format's authors ask of everything that is not integer PCM: an extension (empty) and the frames
        chunks = struct.pack("<4sI", b"fmt ", len(form) + 2) + form + struct.pack("<H", 0)
        chunks += struct.pack("<4sII", b"fact", 4, wave.shape[1])
    chunks += struct.pack("<4sI", b"data", len(data))
    return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks) + len(data), b"WAVE") + chunks + data


def load_sound(source: Path | bytes, name: str | Path, storage: Storage) -> np.ndarray:
    """A sound file as a model that was trained on such storage hears it: float32 ``(C, T)``.

    Raises:
        BadSampleError: see `read_sound` and `conform`.
    """
    return conform(read_sound(source, name), storage, name)


def pack_sound(source: Path | bytes, name: str | Path, storage: Storage) -> bytes:
    """A sound file as the member that is packed. Raises as `load_sound`."""
    return encode_wav(load_sound(source, name, storage), storage)


class WavCodec:
    """Packed WAVs to float32, full scale at -1 and 1: ``(T,)`` of one channel, ``(C, T)`` of more. See `mmlong.datamodules.codecs`.

    Args:
        storage: of the dataset.
    """

    extension = "wav"
    dtype = np.dtype(np.float32)
    fill = 0

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.lead = () if storage.channels == 1 else (storage.channels,)

    def read(self, member: Member, start: int, stop: int) -> np.ndarray:
        """Samples ``start`` to ``stop``."""
        first = self.storage.header
        data = member.read(first + start * self.storage.block, first + stop * self.storage.block)
        try:
            wave = np.frombuffer(data, SUBTYPES[self.storage.subtype]).astype(np.float32)
        except ValueError as error:
            shard, name = member.place
            raise BadSampleError(shard, "is cut short inside a sample", name) from error
        if self.storage.subtype == "PCM_16":
            wave /= 32768
        if not self.lead:
            return wave
        channels = self.storage.channels
        if len(wave) % channels:
            shard, name = member.place
            raise BadSampleError(shard, f"is cut short: {len(wave)} numbers of {channels} channels", name)
        return np.ascontiguousarray(wave.reshape(-1, channels).T)
