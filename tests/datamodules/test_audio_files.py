"""Sound files: every kind that is read, every way to be bad, and the WAV that is packed."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules.audio_files import Storage, WavCodec, conform, encode_wav, pack_sound, read_sound, survey
from mmlong.datamodules.codecs import LoadedMember
from mmlong.datamodules.errors import BadSampleError
from mmlong.datamodules.resample import resample


def tone(frames: int = 1000, channels: int = 1, rate: int = 8000) -> np.ndarray:
    """A sine of 200 Hz at half of full scale, float32 ``(T, C)``."""
    wave = 0.5 * np.sin(2 * np.pi * 200 * np.arange(frames) / rate)
    return np.repeat(wave[:, None].astype(np.float32), channels, 1)


def sound_bytes(kind: str, subtype: str, wave: np.ndarray, rate: int = 8000) -> bytes:
    """A sound file in memory."""
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind, subtype=subtype)
    return out.getvalue()


KINDS = {
    ("WAV", "PCM_16"): 2**-15, ("WAV", "PCM_24"): 2**-23, ("WAV", "PCM_32"): 2**-23, ("WAV", "FLOAT"): 0, ("WAV", "DOUBLE"): 0,
    ("WAV", "PCM_U8"): 2**-7, ("WAV", "ULAW"): 2**-5, ("WAV", "ALAW"): 2**-5, ("FLAC", "PCM_16"): 2**-15, ("FLAC", "PCM_24"): 2**-23,
    ("OGG", "VORBIS"): 0.05, ("AIFF", "PCM_16"): 2**-15, ("AU", "PCM_16"): 2**-15, ("W64", "PCM_16"): 2**-15,
    ("RF64", "PCM_24"): 2**-23, ("CAF", "PCM_16"): 2**-15, ("MP3", "MPEG_LAYER_III"): 0.1,
}  # fmt: skip
"""What libsndfile writes and reads, and how far a sample may be from the one written."""


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_kind_is_read(kind: str, subtype: str, channels: int, tmp_path: Path) -> None:
    wave = tone(2311, channels)
    file = tmp_path / "tone"
    file.write_bytes(sound_bytes(kind, subtype, wave))
    sound = read_sound(file, file)
    assert sound.rate == 8000
    assert sound.wave.dtype == np.float32
    assert sound.wave.shape[0] == channels
    if kind != "MP3":  # which adds silence at both ends
        assert sound.wave.shape == (channels, 2311)
        assert np.abs(sound.wave - wave.T).max() <= KINDS[kind, subtype] * 1.01


@pytest.mark.parametrize(
    ("kind", "subtype"), [pair for pair in KINDS if pair[0] not in ("MP3",)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("lost", [3, 700])
def test_a_file_cut_short_is_refused(kind: str, subtype: str, lost: int) -> None:
    data = sound_bytes(kind, subtype, tone(4000))
    lost = min(lost, len(data) // 3)
    if kind == "CAF":
        lost += 4096  # libsndfile pads the file to 4 KiB
        data = sound_bytes(kind, subtype, tone(8000))
    with pytest.raises(BadSampleError, match=r"x\.snd: .*cut short"):
        read_sound(data[:-lost], "x.snd")


def wav(frames: bytes, *, code: int = 1, bits: int = 16, rate: int = 8000, promised: int | None = None) -> bytes:
    """A mono WAV, written by hand."""
    form = struct.pack("<HHIIHH", code, 1, rate, rate * bits // 8, bits // 8, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form
    body += b"data" + struct.pack("<I", len(frames) if promised is None else promised) + frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


BAD = {
    "an empty file": (b"", "is an empty file"),
    "no sound": (b"these are letters, not samples", "cannot be read as a sound"),
    "a WAV without samples": (wav(b""), "holds no samples"),
    "a header that promises more": (wav(bytes(200), promised=4000), "is cut short: its header promises 4,000 and there are 200"),
    "a header of unknown length": (wav(bytes(200), promised=0xFFFFFFFF), "is cut short"),
    "NaN": (wav(np.array([0, 0.5, np.nan], "<f4").tobytes(), code=3, bits=32), "NaN or infinite samples, the first at 2 "),
    "infinity": (wav(np.array([0, -np.inf], "<f4").tobytes(), code=3, bits=32), "NaN or infinite samples, the first at 1 "),
    "only a header": (wav(b"")[:30], "cannot be read as a sound"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named(what: str, tmp_path: Path) -> None:
    data, reason = BAD[what]
    file = tmp_path / "bad.wav"
    file.write_bytes(data)
    with pytest.raises(BadSampleError, match=rf"bad\.wav: .*{reason}"):
        read_sound(file, file)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"gone\.wav: cannot be read: No such file"):
        read_sound(tmp_path / "gone.wav", tmp_path / "gone.wav")


def test_a_sloppy_length_of_the_whole_file_is_no_lie() -> None:
    data = bytearray(wav(bytes(200)))
    data[4:8] = struct.pack(
        "<I", len(data) + 8
    )  # many writers count the whole file, or a byte of padding that is not there
    assert read_sound(bytes(data), "x.wav").wave.shape == (1, 100)


def test_what_nobody_asked_to_be_changed_is_refused() -> None:
    at_16k = sound_bytes("WAV", "PCM_16", tone(100), 16000)
    with pytest.raises(BadSampleError, match=r"x\.wav: is at 16,000 Hz and 8,000 Hz is due; ask for resampling"):
        pack_sound(at_16k, "x.wav", Storage(8000))
    stereo = sound_bytes("WAV", "PCM_16", tone(100, 2))
    with pytest.raises(BadSampleError, match=r"has 2 channels and 1 are due; ask for mixing"):
        pack_sound(stereo, "x.wav", Storage(8000))
    with pytest.raises(BadSampleError, match=r"has 1 channels and 2 are due"):
        pack_sound(at_16k, "x.wav", Storage(16000, 2, mix=True))
    loud = sound_bytes("WAV", "FLOAT", tone(100) * 3)
    with pytest.raises(BadSampleError, match=r"peaks at 1\.5\d\d, beyond full scale"):
        pack_sound(loud, "x.wav", Storage(8000))
    assert len(pack_sound(loud, "x.wav", Storage(8000, subtype="FLOAT"))) == 58 + 400
    with pytest.raises(ValueError, match="stored as PCM_16 or FLOAT, not 'PCM_24'"):
        Storage(8000, subtype="PCM_24")


def test_stereo_is_mixed_to_its_mean() -> None:
    wave = np.stack([np.full(5, 0.5), np.full(5, -0.25)], 1).astype(np.float32)
    mixed = conform(read_sound(sound_bytes("WAV", "FLOAT", wave), "x"), Storage(8000, mix=True), "x")
    assert np.allclose(mixed, 0.125)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.integers(-32768, 32767), min_size=1, max_size=40), channels=st.integers(1, 3),
    subtype=st.sampled_from(["PCM_16", "FLOAT"]), data=st.data(),
)  # fmt: skip
def test_the_packed_wav(values: list[int], channels: int, subtype: str, data: st.DataObject) -> None:
    """16-bit samples come back exactly, whole (by libsndfile) and by the stretch (by the codec)."""
    wave = np.repeat(np.array(values, np.float32)[None] / 32768, channels, 0)
    wave *= np.array([1, -0.5, 0.25], np.float32)[:channels, None]
    wave = np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.float32) / 32768
    storage = Storage(8000, channels, subtype)
    member = encode_wav(wave, storage)
    assert storage.frames(member) == len(values)
    with soundfile.SoundFile(io.BytesIO(member)) as file:
        assert (file.samplerate, file.channels, file.subtype, file.format) == (8000, channels, subtype, "WAV")
        assert np.array_equal(file.read(dtype="float32", always_2d=True).T, wave)
        assert "should be" not in file.extra_info
        assert "***" not in file.extra_info
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    piece = WavCodec(storage).read(LoadedMember(member, ("shard", "0.wav")), start, stop)
    assert np.array_equal(piece, wave[0, start:stop] if channels == 1 else wave[:, start:stop])
    assert encode_wav(wave, storage) == member, "the same samples make the same bytes"


def test_a_member_cut_inside_a_sample() -> None:
    member = encode_wav(np.zeros((2, 10), np.float32), Storage(8000, 2))
    codec = WavCodec(Storage(8000, 2))
    for lost in (1, 2):
        with pytest.raises(BadSampleError, match=r"shard \[0\.wav\]: is cut short"):
            codec.read(LoadedMember(member[:-lost], ("shard", "0.wav")), 5, 10)


def test_resampling_keeps_a_tone() -> None:
    before, after = tone(4000, rate=16000).T, tone(2000, rate=8000).T
    made = resample(before, 16000, 8000)
    assert made.shape == (1, 2000)
    assert np.abs(made - after)[:, 100:-100].max() < 2e-3
    assert resample(before, 8000, 8000) is before
    whistle = np.sin(2 * np.pi * 5000 * np.arange(4000) / 16000).astype(np.float32)[None]
    assert np.abs(resample(whistle, 16000, 8000))[:, 100:-100].max() < 2e-3, "what 8 kHz cannot hold must not fold back"
    with pytest.raises(ValueError, match="44099 to 8000 Hz is the ratio 44099:8000, too fine"):
        resample(before, 44099, 8000)
    with pytest.raises(ValueError, match="at least 1 Hz"):
        resample(before, 0, 8000)


def test_an_empty_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "e.wav").touch()
    for read in (lambda: survey(tmp_path / "e.wav", "e.wav"), lambda: read_sound(tmp_path / "e.wav", "e.wav")):
        with pytest.raises(BadSampleError, match="is an empty file"):
            read()


def test_what_is_no_sound_is_told_without_addresses(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("one\n" * 40)
    with pytest.raises(BadSampleError) as refused:
        read_sound(file, file)
    assert refused.value.reason == "cannot be read as a sound, or is cut short (Format not recognised)"
