"""Recordings to batches: packed samples as they were, changes as pure functions, and the sources of sounds."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules import foxdot, fsdd
from mmlong.datamodules.audio import AudioDataModule
from mmlong.datamodules.audio_augment import SOUND_CHANGES
from mmlong.datamodules.audio_files import Storage, encode_wav
from mmlong.datamodules.augment import Augment
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.known import find_source, known_sequences
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.packed import PackedDataset, verify
from mmlong.datamodules.records import Record, SequenceSource
from mmlong.datamodules.sound_folders import sound_folder, torchaudio_source

from mmlong.cli.pack import run_pack
from mmlong.modalities import create_modality


def noise(number: int, frames: int, channels: int = 1) -> np.ndarray:
    """Random 16-bit samples, float32 ``(C, T)``."""
    draw = np.random.default_rng(number)
    return draw.integers(-32768, 32768, (channels, frames)).astype(np.float32) / 32768


def pack(folder: Path, lengths: list[int], storage: Storage, splits: list[str] | None = None) -> PackedDataset:
    """Recordings of random samples, named by their number, labelled in turn."""
    records = [
        Record(
            str(n),
            partial(encode_wav, noise(n, frames, storage.channels), storage),
            {"kind": n % 2},
            {"note": n},
            splits[n] if splits else None,
        )
        for n, frames in enumerate(lengths)
    ]
    source = SequenceSource(
        "made", "audio", "wav", storage.about, "made up", "none needed", records, {"kind": ("even", "odd")}, "kind", storage.frames
    )  # fmt: skip
    return pack_sequences(source, folder, splits={"val": 2})


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("cache", [False, True])
def test_batches_hold_the_recordings(channels: int, subtype: str, cache: bool, tmp_path: Path) -> None:
    pack(tmp_path / "packed", [31, 1, 17, 64, 9], Storage(8000, channels, subtype))
    assert verify(tmp_path / "packed") == []
    data = AudioDataModule(str(tmp_path / "packed"), batch_size=3, cache=cache)
    assert data.info() == {
        "modality": {"rate": 8000, "channels": channels}, "num_classes": 2, "class_names": ["even", "odd"],
    }  # fmt: skip
    modality = create_modality("audio", 8, **data.info()["modality"])
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            tokens, layout = modality.encode(batch["raw"], batch.get("lengths"))
            assert tokens.shape[2] == channels
            for row, index in enumerate(batch["index"].tolist()):
                length = int(batch["lengths"][row]) if "lengths" in batch else batch["raw"].shape[-1]
                number = {31: 0, 1: 1, 17: 2, 64: 3, 9: 4}[length]
                wave = torch.from_numpy(noise(number, length, channels))
                assert batch["raw"][row, ..., :length].equal(wave[0] if channels == 1 else wave)
                assert not batch["raw"][row, ..., length:].any()
                assert batch["label"][row] == number % 2
                assert index >= 0
            assert layout.lengths is None or layout.lengths.equal(batch["lengths"])


def test_a_stream(tmp_path: Path) -> None:
    """Rows of one stream with resets; a long recording is read by the stretch, over the borders of checksummed blocks."""
    lengths = [700_000, 5, 31, 40]
    pack(tmp_path / "packed", lengths, Storage(8000), ["train", "val", "val", "val"])
    data = AudioDataModule(str(tmp_path / "packed"), windows="stream", length=4096, batch_size=4, eval_batch_size=64)
    assert data.info() == {"modality": {"rate": 8000, "channels": 1}}
    long = noise(0, lengths[0])[0]
    for batch in data.train_dataloader():
        assert batch.keys() == {"raw", "index", "weight"}
        for row in batch["raw"].numpy():
            start = int(np.flatnonzero((long[:-1] == row[0]) & (long[1:] == row[1]))[0])
            assert np.array_equal(row, long[start : start + 4096])
    (batch,) = data.val_dataloader()
    starts = batch["resets"][0].nonzero().flatten().tolist()
    found = np.split(batch["raw"][0].numpy(), starts[1:])
    assert sorted(map(len, found)) == lengths[1:]
    assert all(np.array_equal(wave, noise(lengths.index(len(wave)), len(wave))[0]) for wave in found)


def test_the_streaming_reader_gives_the_same(tmp_path: Path) -> None:
    pack(tmp_path / "packed", [31, 1, 17, 64, 9, 25], Storage(8000, 2))
    data = AudioDataModule(str(tmp_path / "packed"), batch_size=2, reader="streaming")
    for batch in data.train_dataloader():
        for row in range(2):
            length = int(batch["lengths"][row]) if "lengths" in batch else batch["raw"].shape[-1]
            number = [31, 1, 17, 64, 9, 25].index(length)
            assert np.array_equal(batch["raw"][row, :, :length].numpy(), noise(number, length, 2))
            assert batch["label"][row] == number % 2


CHANGES = [f"{name}:{amount}" if amount else name for name, (_, amount) in SOUND_CHANGES.items()]


@settings(deadline=None, max_examples=60)
@given(
    change=st.sampled_from(CHANGES), channels=st.sampled_from([None, 1, 2]), frames=st.integers(1, 500), epoch=st.integers(0, 5),
    sample=st.integers(0, 5),
)  # fmt: skip
def test_changes_are_pure_functions(
    change: str, channels: int | None, frames: int, epoch: int, sample: int
) -> None:  # fmt: skip
    wave = noise(1, frames, channels or 1)
    wave = wave[0] if channels is None else wave
    before = wave.copy()
    changed = Augment([change], 3, SOUND_CHANGES)(wave, epoch, sample)
    assert np.array_equal(wave, before), "the packed samples were written to"
    assert changed.dtype == np.float32
    assert changed.ndim == wave.ndim
    assert changed.shape[:-1] == wave.shape[:-1]
    assert changed.shape[-1] >= 1
    assert np.isfinite(changed).all()
    assert np.array_equal(changed, Augment([change], 3, SOUND_CHANGES)(wave, epoch, sample))


def changed(change: str, wave: np.ndarray, count: int = 40) -> list[np.ndarray]:
    """The wave as it is changed in as many epochs."""
    return [Augment([change], 0, SOUND_CHANGES)(wave, epoch, 0) for epoch in range(count)]


def test_what_the_changes_do() -> None:
    wave = noise(0, 1000)[0] / 4
    peak = np.abs(wave).max()
    levels = [20 * np.log10(np.abs(made).max() / peak) for made in changed("gain:6", wave)]
    assert -6.01 < min(levels) < -4
    assert 4 < max(levels) < 6.01
    assert {float(made[0] / wave[0]) for made in changed("polarity", wave)} == {-1.0, 1.0}
    lengths = {made.shape[0] for made in changed("speed:10", wave)}
    assert lengths <= {-(-1000 * 100 // (100 + faster)) for faster in range(-10, 11)}
    assert len(lengths) > 8
    starts = [int(np.flatnonzero(made)[0]) for made in changed("shift:50", wave)]
    assert max(starts) > 25
    assert all(np.array_equal(made[start:], wave[: 1000 - start]) for made, start in zip(changed("shift:50", wave), starts, strict=True) if start)  # fmt: skip
    assert all(made.shape[0] >= 900 for made in changed("crop:0.1", wave))
    assert 0 < max(int((made == 0).sum() - (wave == 0).sum()) for made in changed("drop:0.1", wave)) <= 100
    assert max(float(np.std(made - wave)) for made in changed("noise:0.01", wave)) < 0.011
    shares = [(made[1:] - wave[1:]) @ wave[:-1] / (wave[:-1] @ wave[:-1]) for made in changed("tilt:0.5", wave)]
    assert -0.51 < min(shares) < -0.3
    assert 0.3 < max(shares) < 0.51
    with pytest.raises(ValueError, match="there is no 'gian'; did you mean 'gain'"):
        Augment(["gian"], 0, SOUND_CHANGES)


def test_a_change_of_length_is_for_whole_recordings(tmp_path: Path) -> None:
    pack(tmp_path / "packed", [40, 400, 300, 50], Storage(8000))
    data = AudioDataModule(str(tmp_path / "packed"), batch_size=2, length=200, augment=["speed:50"])
    lengths = [b["raw"].shape[-1] for _ in range(3) for b in data.train_dataloader()]
    assert max(lengths) <= 200
    data = AudioDataModule(str(tmp_path / "packed"), windows="stream", batch_size=2, length=20, augment=["speed:50"])
    with pytest.raises(ValueError, match="in a stream every row keeps its length"):
        list(data.train_dataloader())


def test_training_may_crop_as_evaluation_does(tmp_path: Path) -> None:
    pack(tmp_path / "packed", [400, 400, 40, 40], Storage(8000), ["train", "train", "val", "val"])
    heads = [noise(n, 400)[0, :50] for n in (0, 1)]
    for train_crop, same in (("same", True), ("random", False)):
        data = AudioDataModule(str(tmp_path / "packed"), batch_size=2, length=50, train_crop=train_crop)
        (batch,) = data.train_dataloader()
        found = [any(np.array_equal(row, head) for head in heads) for row in batch["raw"].numpy()]
        assert all(found) == same
    with pytest.raises(ValueError, match="train_crop is 'head'; it can be random or same"):
        AudioDataModule(str(tmp_path / "packed"), train_crop="head")


# folders and torchaudio's lists


def write(file: Path, number: int, rate: int = 8000, channels: int = 1, subtype: str = "PCM_16") -> None:
    """A short sound file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, noise(number, 50 + number, channels).T / 2, rate, subtype=subtype)


@pytest.fixture
def drums(tmp_path: Path) -> Path:
    """Ten sounds in two class folders."""
    folder = tmp_path / "drums"
    for number in range(10):
        write(folder / ("kick" if number % 2 else "snare") / f"{number}.wav", number)
    return folder


def test_class_folders_and_tables(drums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_pack(["audio", str(drums), str(tmp_path / "out"), "--split", "test=2"]) == 0
    assert "audio, 545 tokens; train 8, test 2" in capsys.readouterr().out
    dataset = PackedDataset(tmp_path / "out")
    assert dataset.classes("label") == ("kick", "snare")
    assert dataset.manifest["audio"]["rate"] == 8000
    table = tmp_path / "t.csv"
    table.write_text("file,label,split\nkick/1.wav,low,test\nsnare/2.wav,high,\n")
    source = sound_folder(drums, table)
    assert [(record.name, record.split) for record in source.records] == [("kick/1.wav", "test"), ("snare/2.wav", None)]
    assert source.labels == {"label": ("high", "low")}
    bare = sound_folder(drums, labelled=False)
    assert len(bare.records) == 10
    assert bare.labels == {}


def test_untidy_folders(drums: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(drums / "kick" / "x.wav", 3, rate=11025)
    with pytest.raises(
        BadSampleError, match=r"x\.wav: is at 11,025 Hz and .*1\.wav \(with 9 others\) at 8,000 Hz; give a --rate"
    ):
        pack_sequences(sound_folder(drums), out)
    write(drums / "kick" / "y.flac", 3, channels=2, subtype="PCM_24")
    with pytest.raises(BadSampleError, match=r"y\.flac: has 2 channels and .* has 1; mix all of them with --mono"):
        pack_sequences(sound_folder(drums, rate=8000), out)
    dataset = pack_sequences(sound_folder(drums, rate=4000, mono=True), out)
    assert dataset.manifest["audio"] == Storage(4000, resample=True, mix=True).about
    (drums / "kick" / "z.wav").write_bytes(b"RIFF")
    nan = np.array([0, np.nan], np.float32)
    soundfile.write(drums / "kick" / "nan.wav", nan, 8000, subtype="FLOAT")
    with pytest.raises(BadSampleError, match=r"z\.wav: cannot be opened as a sound"):
        pack_sequences(sound_folder(drums, rate=4000, mono=True), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    skipped = pack_sequences(sound_folder(drums, mono=True), tmp_path / "skipped", on_bad="skip")
    reasons = " ".join(skipped.manifest["skipped_samples"])
    assert skipped.manifest["skipped"] == 3
    assert all(name in reasons for name in ("x.wav", "z.wav", "nan.wav"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no sounds in it"):
        sound_folder(tmp_path / "empty")
    (tmp_path / "empty" / "a").mkdir()
    (tmp_path / "empty" / "a" / "z.wav").write_bytes(b"RIFF")
    with pytest.raises(BadSampleError, match=r"z\.wav: cannot be opened"):
        sound_folder(tmp_path / "empty")


def test_the_odd_one_out_is_the_one_that_differs_from_most(drums: Path, tmp_path: Path) -> None:
    """Also where it comes first."""
    write(drums / "kick" / "0.wav", 3, rate=44100, channels=2)
    with pytest.raises(BadSampleError, match=r"0\.wav: is at 44,100 Hz and .*1\.wav \(with 9 others\) at 8,000 Hz"):
        pack_sequences(sound_folder(drums), tmp_path / "out")
    with pytest.raises(BadSampleError, match=r"0\.wav: has 2 channels and .* has 1"):
        pack_sequences(sound_folder(drums, rate=8000), tmp_path / "out")
    dataset = pack_sequences(sound_folder(drums), tmp_path / "out", on_bad="skip")
    assert dataset.manifest["audio"]["rate"] == 8000
    assert dataset.manifest["skipped"] == 1


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """The file tree of Speech Commands, small."""
    tree = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    names = [f"{word}/{speaker}_nohash_0.wav" for word in ("yes", "no") for speaker in ("a1", "b2", "c3", "d4")]
    for number, name in enumerate(names):
        write(tree / name, number, rate=16000)
    write(tree / "_background_noise_" / "rain.wav", 9, rate=16000)
    (tree / "validation_list.txt").write_text("yes/b2_nohash_0.wav\n")
    (tree / "testing_list.txt").write_text("yes/c3_nohash_0.wav\nno/c3_nohash_0.wav\n")
    return tree


def test_speech_commands_by_tree_and_by_class(commands: Path, tmp_path: Path) -> None:
    tree = sound_folder(commands)
    assert tree.labels == {"label": ("no", "yes")}
    assert sorted(record.split or "" for record in tree.records) == ["test"] * 2 + ["train"] * 5 + ["val"]
    bare = sound_folder(commands, labelled=False)
    assert [(r.name, r.split) for r in bare.records] == [(r.name, r.split) for r in tree.records]
    assert not bare.labels
    listed = torchaudio_source("SPEECHCOMMANDS", tmp_path)
    assert listed.labels == {"word": ("no", "yes")}
    by_name = {Path(record.name).as_posix().partition("speech_commands_v0.02/")[2]: record for record in listed.records}
    for record in tree.records:
        twin = by_name[record.name]
        assert (twin.split or "train", twin.load()) == (record.split, record.load())
        assert twin.labels == {"word": record.labels["label"]}
    assert verify(pack_sequences(listed, tmp_path / "out").folder) == []
    (commands / "testing_list.txt").write_text("yes/z9_nohash_0.wav\n")
    with pytest.raises(DataError, match=r"\[yes/z9_nohash_0.wav\]: its lists of splits name 1 files that are not"):
        sound_folder(commands)


def test_torchaudio_classes_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such dataset class; did you mean SPEECHCOMMANDS"):
        torchaudio_source("SPEECHCOMMAND", tmp_path)
    with pytest.raises(DataError, match="does not list its files"):
        torchaudio_source("YESNO", tmp_path)
    with pytest.raises(DataError, match="does not take splt; it takes root"):
        torchaudio_source("SPEECHCOMMANDS", tmp_path, {"splt": 1})
    with pytest.raises(DataError, match="torchaudio:SPEECHCOMMANDS: cannot be read from"):
        torchaudio_source("SPEECHCOMMANDS", tmp_path)


# known sources


def digits() -> str | None:
    """Where the spoken digits are on this machine, if they are: in ``$MMLONG_DATA``, or shared beside the checkout."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "fsdd.tar"
    return find_source(known_sequences("fsdd"), None) or (str(beside) if beside.is_file() else None)


needs_digits = pytest.mark.skipif(digits() is None, reason="the Free Spoken Digit Dataset is not on this machine")


@needs_digits
def test_spoken_digits_are_as_published() -> None:
    given = digits()
    source = fsdd.load(given)
    assert len(source.records) == 3000
    assert sum(record.split == "test" for record in source.records) == 300
    one = source.records[0]
    assert (one.name, one.labels) == ("0_george_0.wav", {"digit": 0, "speaker": 0})
    assert one.load()[:4] == b"RIFF"
    assert source.length(one.load()) == 2384
    held = fsdd.load(given, held_out="jackson")
    assert {record.labels["speaker"] == 1 for record in held.records if record.split == "test"} == {True}
    assert {record.labels["speaker"] == 1 for record in held.records if record.split is None} == {False}
    assert sum(record.split == "test" for record in held.records) == 500


def test_spoken_digits_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="clone Jakobovski/free-spoken-digit-dataset and give its folder"):
        fsdd.load(None)
    with pytest.raises(DataError, match=r"holds 0 recordings named like 7_jackson_32.wav, should hold 3,000"):
        fsdd.load(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"x\.tar: is neither a folder nor a whole"):
        fsdd.load(tmp_path / "x.tar")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for n in range(3000):
            member = tarfile.TarInfo(f"clone/recordings/{n % 10}_{fsdd.SPEAKERS[n // 500]}_{n % 500 // 10}.wav")
            tar.addfile(member)
    (tmp_path / "fsdd.tar").write_bytes(data.getvalue())
    with pytest.raises(DataError, match=r"fsdd\.tar: is not the published set \(SHA-256"):
        fsdd.load(tmp_path / "fsdd.tar")
    with pytest.raises(ValueError, match="has the speakers george, .*, not 'jason'"):
        fsdd.load(tmp_path, held_out="jason")


def test_spoken_digits_have_a_name_for_each_speaker(tmp_path: Path) -> None:
    for name in ("fsdd", *(f"fsdd-without-{speaker}" for speaker in fsdd.SPEAKERS)):
        data = AudioDataModule(name, root=str(tmp_path))
        assert data.info()["class_names"] == list("0123456789")
        assert data.info()["modality"] == {"rate": 8000, "channels": 1}
        with pytest.raises(DataError, match="clone Jakobovski"):
            data.prepare_data()


@pytest.mark.skipif(find_spec("FoxDot") is None, reason="foxdot is not installed (the data extra)")
def test_percussion_is_as_published(tmp_path: Path) -> None:
    source = foxdot.load()
    assert len(source.records) == 148
    names = [source.labels["instrument"][record.labels["instrument"]] for record in source.records]
    assert min(names.count(name) for name in foxdot.INSTRUMENTS) == 9
    groups = [record.group for record in source.records]
    twins = [record.name for record in source.records if groups.count(record.group) > 1]
    assert sorted(twins) == [
        "o/lower/4_snare_drum.wav", "o/upper/O (2).wav", "o/upper/O (5).wav", "o/upper/O (7).wav",
        "v/upper/heavy 1.wav", "v/upper/heavy 2.wav",
    ]  # fmt: skip
    data = AudioDataModule("foxdot", root=str(tmp_path), batch_size=4, length=5000)
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert batch["raw"].shape == (4, 5000)
    assert batch["raw"].abs().max() <= 1
    with pytest.raises(DataError, match="holds 0 sounds of 9 instruments, should hold 148; install foxdot"):
        foxdot.load(tmp_path)
