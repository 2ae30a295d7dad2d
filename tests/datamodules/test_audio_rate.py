"""Packed sounds read at another rate: what packing at that rate would have made of them, whole or by the stretch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules.audio import AudioDataModule
from mmlong.datamodules.audio_files import Storage, encode_wav, pack_sound
from mmlong.datamodules.audio_rate import ResampledWavs
from mmlong.datamodules.codecs import LoadedMember
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.records import Record, SequenceSource


def wave(number: int, frames: int, channels: int = 1) -> np.ndarray:
    """Noise and a wave at the edge of clipping, float32 ``(C, T)`` of 16 bits."""
    draw = np.random.default_rng(number)
    found = 0.4 * draw.normal(size=(channels, frames)) + 0.7 * np.sin(np.arange(frames) / 9)
    return np.rint(found.clip(-1, 0.999) * 32768).astype(np.float32) / 32768


def pack(folder: Path, lengths: list[int], storage: Storage, held: Storage | None = None) -> None:
    """Recordings at the rate of ``held``, packed as ``storage`` says."""
    held = held or storage
    records = [
        Record(
            str(n),
            partial(pack_sound, encode_wav(wave(n, frames, storage.channels), held), str(n), storage),
            {"kind": n % 2},
            split="train",
        )
        for n, frames in enumerate(lengths)
    ]
    labels = {"kind": ("even", "odd")}
    pack_sequences(
        SequenceSource("made", "audio", "wav", storage.about, "made", "none", records, labels, "kind", storage.frames),
        folder,
    )


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("rate", [4000, 12000, 5512])
@pytest.mark.parametrize("cache", [False, True])
def test_as_if_packed_at_that_rate(channels: int, subtype: str, rate: int, cache: bool, tmp_path: Path) -> None:
    lengths, held = [901, 1, 700], Storage(8000, channels, subtype)
    pack(tmp_path / "here", lengths, held)
    pack(tmp_path / "there", lengths, Storage(rate, channels, subtype, resample=True), held)
    here = AudioDataModule(str(tmp_path / "here"), rate=rate, batch_size=3, cache=cache)
    there = AudioDataModule(str(tmp_path / "there"), batch_size=3)
    assert here.info() == there.info()
    assert here.info()["modality"]["rate"] == rate
    (mine,), (theirs,) = (list(each.train_dataloader()) for each in (here, there))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].equal(value), key


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_stretch_is_a_stretch_of_the_whole(data: st.DataObject) -> None:
    rate = data.draw(st.sampled_from([4000, 3000, 12000, 8100, 7900, 16000, 5512]))
    frames = data.draw(st.integers(1, 3000))
    storage = Storage(8000, data.draw(st.sampled_from([1, 2])), "FLOAT")
    codec = ResampledWavs(storage, rate)
    member = LoadedMember(encode_wav(wave(frames, frames, storage.channels), storage), ("a shard", "a member"))
    length = int(codec.lengths(np.array([frames]))[0])
    whole = codec.read(member, 0, length)
    assert whole.shape == (*codec.lead, length)
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    np.testing.assert_allclose(codec.read(member, start, stop), whole[..., start:stop], rtol=0, atol=2e-6)


def test_a_stream_at_another_rate(tmp_path: Path) -> None:
    """Rows of one stream; what is long is read by the stretch, off by the last of 16 bits at most."""
    pack(tmp_path / "packed", [40_000, 31, 900], Storage(8000))
    rows = AudioDataModule(str(tmp_path / "packed"), windows="stream", length=1000, rate=4000).samples("train", False)
    whole = AudioDataModule(str(tmp_path / "packed"), rate=4000).samples("train", False)
    assert len(rows) == (20_000 + 16 + 450) // 1000 + 1
    found = np.concatenate(
        [row["raw"].numpy().ravel() for row, _ in (rows.fetch([(0, n, 1.0)]) for n in range(len(rows)))]
    )
    for n in range(3):
        (one,) = whole.fetch([(0, n, 1.0)])[0]["raw"].numpy()
        places = [i for i in range(len(found) - len(one) + 1) if abs(found[i] - one[0]) < 1e-4]
        assert any(np.abs(found[i : i + len(one)] - one).max() < 4e-5 for i in places)


def test_rates_that_cannot_be(tmp_path: Path) -> None:
    pack(tmp_path / "packed", [9, 9], Storage(44100))
    with pytest.raises(ValueError, match=r"data\.rate is 0"):
        AudioDataModule(str(tmp_path / "packed"), rate=0)
    with pytest.raises(ValueError, match="44100 to 44099 Hz is the ratio .* too fine"):
        AudioDataModule(str(tmp_path / "packed"), rate=44099).info()
    same = AudioDataModule(str(tmp_path / "packed"), rate=44100)
    assert not isinstance(same.codec, ResampledWavs)
    assert "rate" not in AudioDataModule(str(tmp_path / "packed")).fixed_settings()
    assert same.fixed_settings()["rate"] == "44100"
