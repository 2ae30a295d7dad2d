"""Speech Commands from a folder of the user's: a miniature in the published form is packed and read back; what is not the published form is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mmlong.datamodules.audio import AudioDataModule
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.known import known_names, known_sequences
from mmlong.datamodules.packed import verify
from mmlong.datamodules.speech_commands import ALL, TEN

from mmlong.cli.pack import run_pack

SPEAKERS = ("0a7c2a8d", "1b4c9b89", "6f2f57c1")


def say(file: Path, number: int, frames: int = 200, rate: int = 16000) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(number).integers(-9000, 9000, frames).astype(np.int16)
    soundfile.write(file, wave, rate, subtype="PCM_16")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The published tree: three recordings a word, of which the second is in the validation list and the third in the testing list."""
    folder = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    for number, word in enumerate(ALL):
        for speaker in SPEAKERS:
            say(folder / word / f"{speaker}_nohash_0.wav", number, frames=200 + number)
    say(folder / "_background_noise_" / "running_tap.wav", 99, frames=900)
    for name, speaker in (("validation_list.txt", SPEAKERS[1]), ("testing_list.txt", SPEAKERS[2])):
        (folder / name).write_text("".join(f"{word}/{speaker}_nohash_0.wav\n" for word in ALL))
    return folder


@pytest.mark.parametrize("given", ["itself", "above", "torchaudio's root"])
@pytest.mark.parametrize(("name", "words"), [("speech-commands-35", ALL), ("speech-commands-10", TEN)])
def test_words_and_official_splits(name: str, words: tuple[str, ...], given: str, tree: Path) -> None:
    place = {"itself": tree, "above": tree.parent, "torchaudio's root": tree.parent.parent}[given]
    source = known_sequences(name).load(str(place))
    assert source.labels == {"word": words} == known_sequences(name).labels
    assert Counter(record.split for record in source.records) == dict.fromkeys(("train", "val", "test"), len(words))
    for record in source.records:
        word, _, file = record.name.partition("/")
        assert words[record.labels["word"]] == word
        assert record.split == ("train", "val", "test")[SPEAKERS.index(file.partition("_")[0])]


def test_packed_and_read_at_both_rates(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert run_pack(["speech-commands-10", str(out), "--source-path", str(tree)]) == 0
    assert verify(out) == []
    for rate in (16000, 8000):
        data = AudioDataModule(str(out), rate=rate, batch_size=10, length=rate)
        assert data.info()["modality"] == {"rate": rate, "channels": 1}
        assert data.info()["class_names"] == list(TEN)
        (batch,) = data.test_dataloader()
        assert sorted(batch["label"].tolist()) == list(range(10))
        for label, length in zip(batch["label"].tolist(), batch["lengths"].tolist(), strict=True):
            assert length == -(-(200 + ALL.index(TEN[label])) * rate // 16000)


def test_the_lists_of_papers() -> None:
    assert (len(set(ALL)), len(ALL), len(set(TEN))) == (35, 35, 10)
    assert set(TEN) < set(ALL)
    assert {"speech-commands-10", "speech-commands-35"} < set(known_names("audio"))


def test_what_is_not_the_published_form(tree: Path, tmp_path: Path) -> None:
    ten, all_words = (known_sequences(f"speech-commands-{n}") for n in (10, 35))
    with pytest.raises(DataError, match=r"speech-commands-10: is in no package: unpack .* --data\.source_path"):
        ten.load(None)
    with pytest.raises(DataError, match=r"has neither validation_list\.txt nor testing_list\.txt"):
        ten.load(str(tmp_path / "elsewhere"))
    (tree / "backward" / f"{SPEAKERS[2]}_nohash_0.wav").unlink()
    assert len(ten.load(str(tree)).records) == 30  # none of the ten
    with pytest.raises(DataError, match=r"\[backward/6f2f57c1_nohash_0.wav\]: its lists of splits name 1 files"):
        all_words.load(str(tree))
    for file in (tree / "backward").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="backward: holds no WAV files; speech-commands-35 has 35 words"):
        all_words.load(str(tree))
    say(tree / "yes" / "0a7c2a8d_nohash_1.wav", 1, rate=8000)
    (odd,) = (record for record in ten.load(str(tree)).records if record.name == "yes/0a7c2a8d_nohash_1.wav")
    with pytest.raises(BadSampleError, match="is at 8,000 Hz and 16,000 Hz is due"):
        odd.load()
    (tree / "testing_list.txt").unlink()
    with pytest.raises(DataError, match=r"testing_list\.txt: is missing: without both lists"):
        ten.load(str(tree))
