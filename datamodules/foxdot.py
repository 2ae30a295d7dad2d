"""Percussion: one-shots that come with FoxDot 0.9.0, from the installed package's files. Untidy on purpose: what sound folders are like.

``FoxDot/snd/`` has a folder a symbol; FoxDot's own table (``lib/Buffers.py``) says what each holds ("Heavy kick", "Hi hat closed"). Here the folders
of one instrument are one class, and folders of voices, noises and effects are left out: nine instruments, 148 sounds, none of which has fewer than nine. By
folder alone the same recording has two names (``o/lower/4_snare_drum.wav`` is ``o/upper/O (7).wav``).

The files are WAV and AIFF of 16 and 24 bits and float, mono and stereo, at 22,050 to 96,000 Hz: mixed to mono and resampled to 44,100 Hz, 16 bits.
Files of identical samples are one group and never part.

Source: Ryan Kirkbride and contributors, FoxDot 0.9.0 (package foxdot). CC BY-SA 4.0.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from .audio_files import SUFFIXES, Storage, pack_sound, read_sound
from .errors import DataError
from .records import KnownSequences, Record, SequenceSource
from .sources import package_folder

INSTRUMENTS: dict[str, tuple[str, ...]] = {
    "kick": ("a/upper", "v/lower", "v/upper", "x/lower", "x/upper"),
    "snare": ("d/upper", "i/lower", "i/upper", "o/lower", "o/upper", "u/lower"),
    "hihat": ("a/lower", "_/hyphen", "_/equals", "_/colon"),
    "cymbal": ("_/tilde", "_/hash"),
    "clap": ("h/lower", "h/upper", "_/asterix"),
    "tom": ("m/lower", "m/upper"),
    "tabla": ("p/lower", "p/upper"),
    "shaker": ("k/lower", "s/lower", "s/upper"),
    "block": ("d/lower", "e/lower", "t/lower", "t/upper"),  # woodblock, cowbells, rimshot
}
LABELS = {"instrument": tuple(INSTRUMENTS)}
STORAGE = Storage(rate=44100, resample=True, mix=True)
SOURCE = "FoxDot 0.9.0: 148 percussion one-shots of nine instruments, 44.1 kHz mono (package foxdot)"
LICENCE = "CC BY-SA 4.0: attribution, share alike"
COUNT = 148
# SHA-256 over, for each of them in name order, its name, a zero byte and the SHA-256 of its bytes.
SHA256 = "2ac6bfef5807e94da9257b0c1ae52b42da54d69b389b58279cb4d7675464d5a1"


def load(given: str | Path | None = None) -> SequenceSource:
    """List the sounds.

    Args:
        given: the folder ``snd``; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or its files are not the ones that were published.
        BadSampleError: a sound is damaged.
    """
    folder = Path(given) if given is not None else package_folder("FoxDot", "foxdot") / "snd"
    classes = {place: name for name, places in INSTRUMENTS.items() for place in places}
    files = {
        file.relative_to(folder).as_posix(): file
        for place in classes
        for file in (folder / place).glob("*")
        if file.suffix.lower() in SUFFIXES
    }
    if len(files) != COUNT:
        raise DataError(folder, f"holds {len(files)} sounds of {len(INSTRUMENTS)} instruments, should hold {COUNT}; install foxdot 0.9.0 again")  # fmt: skip
    whole = hashlib.sha256()
    records = []
    for name in sorted(files):
        data = files[name].read_bytes()
        whole.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        place = name.rpartition("/")[0]
        records.append(
            Record(
                name=name,
                load=partial(pack_sound, files[name], name, STORAGE),
                labels={"instrument": LABELS["instrument"].index(classes[place])},
                group=hashlib.sha256(read_sound(data, name).wave.tobytes()).hexdigest(),
            )
        )
    if whole.hexdigest() != SHA256:
        raise DataError(folder, f"does not hold the published sounds (SHA-256 {whole.hexdigest()}); install foxdot 0.9.0 again")  # fmt: skip
    return SequenceSource(
        name="foxdot", modality="audio", extension="wav", about=STORAGE.about, source=SOURCE, licence=LICENCE, records=records,
        labels=LABELS, length=STORAGE.frames, default_label="instrument",
    )  # fmt: skip


KNOWN = KnownSequences(
    load=load, modality="audio", about=STORAGE.about, labels=LABELS, splits={"val": 0.1, "test": 0.3}, source=SOURCE, licence=LICENCE
)  # fmt: skip
