"""Spoken digits: the Free Spoken Digit Dataset, 3,000 recordings at 8 kHz, from a folder or a tar that the user gives.

Six speakers say each digit 50 times; ``recordings/{digit}_{speaker}_{index}.wav``, PCM 16, mono, about half a second. It comes in no package: clone
``Jakobovski/free-spoken-digit-dataset`` (or keep it as one tar) and say where it is. Labels: ``digit`` and ``speaker``.

The official test set is each speaker's recordings 0 to 4 of each digit (300). The harder question is how a voice is understood that was never heard:
:func:`load` with ``held_out`` takes all recordings of one speaker as the test set.

Source: Jackson et al., Free Spoken Digit Dataset v1.0.10, 2020 (doi 10.5281/zenodo.1342401). CC BY-SA 4.0.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from .audio_files import Storage, pack_sound
from .errors import DataError
from .records import KnownSequences, Record, SequenceSource

NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
LABELS = {"digit": tuple("0123456789"), "speaker": SPEAKERS}
STORAGE = Storage(rate=8000)
SOURCE = "Free Spoken Digit Dataset: 3,000 recordings of six speakers at 8 kHz (github: Jakobovski/free-spoken-digit-dataset)"
LICENCE = "CC BY-SA 4.0: attribution, share alike"
FILES = ("free-spoken-digit-dataset", "fsdd.tar")  # where it is looked for, beside the packed data
COUNT = 3000
# SHA-256 over, for each recording in name order, its name, a zero byte and the SHA-256 of its bytes.
SHA256 = "a2e8a660492f28d9eed6270b290d26cbc5c81d6077ce87d3c0ad5adf4d4ee696"


def load(given: str | Path | None, held_out: str | None = None) -> SequenceSource:
    """List the recordings.

    Args:
        given: the folder of the clone (or one that holds it), its ``recordings``, or a tar of either.
        held_out: a speaker, all of whose recordings are the test set instead of the official one.

    Raises:
        DataError: nothing was given, or it does not hold the 3,000 recordings that were published.
        ValueError: there is no such speaker.
    """
    if held_out is not None and held_out not in SPEAKERS:
        raise ValueError(f"fsdd has the speakers {', '.join(SPEAKERS)}, not {held_out!r}")
    if given is None:
        raise DataError("fsdd", "is in no package: clone Jakobovski/free-spoken-digit-dataset and give its folder (--data.source_path FOLDER)")  # fmt: skip
    place = Path(given)
    found = _in_folder(place) if place.is_dir() else _in_tar(place)
    if len(found) != COUNT:
        raise DataError(place, f"holds {len(found):,} recordings named like 7_jackson_32.wav, should hold {COUNT:,}; clone Jakobovski/free-spoken-digit-dataset again")  # fmt: skip
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(name.encode() + b"\0" + hashlib.sha256(found[name]()).digest())
    if whole.hexdigest() != SHA256:
        raise DataError(place, f"is not the published set (SHA-256 {whole.hexdigest()}); clone Jakobovski/free-spoken-digit-dataset again")  # fmt: skip
    records = []
    for name in sorted(found):
        digit, speaker, index = NAME.fullmatch(name).groups()  # type: ignore[union-attr]
        held = int(index) < 5 if held_out is None else speaker == held_out
        records.append(
            Record(
                name=name,
                load=partial(_pack, found[name], name),
                labels={"digit": int(digit), "speaker": SPEAKERS.index(speaker)},
                split="test" if held else None,
            )
        )
    name = "fsdd" if held_out is None else f"fsdd-without-{held_out}"
    return SequenceSource(
        name=name, modality="audio", extension="wav", about=STORAGE.about, source=SOURCE, licence=LICENCE, records=records,
        labels=LABELS, length=STORAGE.frames, default_label="digit",
    )  # fmt: skip


def _pack(read: Callable[[], bytes], name: str) -> bytes:
    return pack_sound(read(), name, STORAGE)


def _in_folder(folder: Path) -> dict[str, Callable[[], bytes]]:
    return {file.name: file.read_bytes for file in folder.rglob("*.wav") if NAME.fullmatch(file.name)}


def _in_tar(file: Path) -> dict[str, Callable[[], bytes]]:
    found: dict[str, Callable[[], bytes]] = {}
    try:
        with tarfile.open(file, "r:") as tar:  # not compressed: a recording is then a stretch of the file
            for member in tar:
                name = PurePosixPath(member.name).name
                if member.isreg() and NAME.fullmatch(name):
                    found[name] = partial(_stretch, file, member.offset_data, member.size)
    except FileNotFoundError as error:
        raise DataError(file, "is missing; give the folder (or a tar of it) of Jakobovski/free-spoken-digit-dataset") from error  # fmt: skip
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(file, f"is neither a folder nor a whole, uncompressed tar file: {error}") from error
    return found


def _stretch(file: Path, start: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(start)
        return stream.read(size)


def _known(held_out: str | None) -> KnownSequences:
    return KnownSequences(
        load=partial(load, held_out=held_out), modality="audio", about=STORAGE.about, labels=LABELS, splits={"val": 0.1},
        source=SOURCE, licence=LICENCE, files=FILES,
    )  # fmt: skip


KNOWN = {"fsdd": _known(None), **{f"fsdd-without-{speaker}": _known(speaker) for speaker in SPEAKERS}}
