"""Speech Commands (Warden 2018, arXiv 1804.03209): one word a recording, at most a second at 16 kHz, from the folder of its second version.

    speech-commands-35   all 35 words
    speech-commands-10   yes, no, up, down, left, right, on, off, stop, go: the subset of the papers of neural differential equations and of S4 (SC10)

In no package. What the user gives is the unpacked folder: a sub-folder a word, ``validation_list.txt`` and ``testing_list.txt``, which name the recordings of these splits; no speaker is in two of them. The rest trains. ``_background_noise_`` is no word and left out.

Splits are the official ones for both. Papers' SC35 has them too. Their SC10 (Kidger et al. 2020, arXiv 2005.08926; S4, arXiv 2111.00396) drops recordings shorter than 16,000 samples and divides the other 34,975 at random, 70, 15 and 15 in a hundred, so that one speaker can be trained on and tested: its numbers are not to be compared with these. Neither is Warden's own
task of ten words, which has two more classes (silence, and a word that is none of the ten).

Recordings shorter than a second stay so and rows know their lengths, where S4's code fills up with zeros; samples are as they are, where it brings them to mean 0 and deviation 1. Heard at 8 kHz (``data.rate``), they are low-passed first, where it takes every second sample, with what then folds over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .audio_files import Storage, pack_sound
from .errors import DataError
from .records import KnownSequences, Record, SequenceSource

LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
FOLDERS = ("speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02", "SpeechCommands")
TEN = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
ALL = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy", "house", "learn", "left", "marvin", "nine",
    "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop", "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)  # fmt: skip
STORAGE = Storage(rate=16000)


def official_splits(folder: Path) -> dict[str, str]:
    """The split of each recording that the lists of a folder name, by ``word/file``; of those that are there of the two lists."""
    found: dict[str, str] = {}
    for split, name in LISTS.items():
        if (folder / name).is_file():
            found |= dict.fromkeys((folder / name).read_text(encoding="utf-8").split(), split)
    return found


def find_folder(name: str, given: str | Path | None) -> Path:
    """The folder with the lists, given itself or one above it.

    Raises:
        DataError: none is given, or there is none.
    """
    if given is None:
        raise DataError(name, "is in no package: unpack speech_commands_v0.02 (Warden 2018) and give its folder (--source-path FOLDER, --data.source_path=FOLDER)")  # fmt: skip
    for folder in (Path(given), *(Path(given, below) for below in FOLDERS)):
        if any((folder / each).is_file() for each in LISTS.values()):
            if missing := [each for each in LISTS.values() if not (folder / each).is_file()]:
                raise DataError(folder / missing[0], "is missing: without both lists there are no official splits; unpack speech_commands_v0.02 again")  # fmt: skip
            return folder
    raise DataError(given, f"has neither {' nor '.join(LISTS.values())}: give the unpacked folder of speech_commands_v0.02")  # fmt: skip


def load(name: str, words: Sequence[str], given: str | Path | None) -> SequenceSource:
    """List the recordings of some words.

    Args:
        name: of the dataset.
        words: the classes.
        given: the folder, or one above it.

    Raises:
        DataError: see :func:`find_folder`; a word has no recordings, or a list names one that is not there.
    """
    folder = find_folder(name, given)
    splits = {file: split for file, split in official_splits(folder).items() if file.partition("/")[0] in words}
    records = []
    for number, word in enumerate(words):
        files = sorted((folder / word).glob("*.wav"))
        if not files:
            raise DataError(folder / word, f"holds no WAV files; {name} has {len(words)} words, each a folder of the second version of Speech Commands")  # fmt: skip
        for file in files:
            said = f"{word}/{file.name}"
            split = splits.pop(said, "train")
            records.append(Record(said, partial(pack_sound, file, file, STORAGE), {"word": number}, split=split))
    if splits:
        raise DataError(folder, f"its lists of splits name {len(splits)} files that are not there", min(splits))
    return SequenceSource(
        name=name, modality="audio", extension="wav", about=STORAGE.about, source=KNOWN[name].source, licence=KNOWN[name].licence,
        records=records, labels=KNOWN[name].labels, default_label="word", length=STORAGE.frames,
    )  # fmt: skip


KNOWN = {
    name: KnownSequences(
        load=partial(load, name, words), modality="audio", about=STORAGE.about, labels={"word": words}, splits={},
        source=f"Speech Commands v0.02 (Warden 2018): {len(words)} words at 16 kHz, official splits; the user's copy",
        licence="CC BY 4.0: attribution", files=FOLDERS,
    )
    for name, words in (("speech-commands-35", ALL), ("speech-commands-10", TEN))
}  # fmt: skip
