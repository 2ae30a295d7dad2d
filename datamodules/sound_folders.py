"""Sounds as a source: a folder with one sub-folder a class, a table of file, label, a folder of anything without labels, or a torchaudio dataset class.

Folders and tables are listed as those of images are (`mmlong.datamodules.listing`), and read by the one rule of `mmlong.datamodules.audio_files`.
torchaudio's own reading needs a decoder that is not there on most machines, so of its dataset classes only the lists of files are used, and the files are
read here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .audio_files import SUFFIXES, Storage, pack_sound, survey
from .errors import BadSampleError, DataError
from .listing import Row, class_numbers, list_files
from .records import Record, SequenceSource
from .speech_commands import official_splits

# Where torchaudio's classes keep the label in what `get_metadata` answers (path, rate, ...), and what it is called.
TORCHAUDIO_LABELS = {
    "SPEECHCOMMANDS": ("word", 2),
    "LIBRISPEECH": ("speaker", 3),
    "VoxCeleb1Identification": ("speaker", 2),
    "IEMOCAP": ("emotion", 3),
}
_SUBSETS = {"training": None, "validation": "val", "testing": "test"}


def sound_folder(
    folder: str | Path,
    labels: str | Path | None = None,
    *,
    labelled: bool = True,
    rate: int | None = None,
    mono: bool = False,
    subtype: str = "PCM_16",
    licence: str = "not stated",
) -> SequenceSource:
    """List the sounds of a folder.

    The file tree of Speech Commands (Warden 2018) is known by its lists, ``validation_list.txt`` and ``testing_list.txt``: they are the splits, and folders
    with a leading underscore (background noise) are no classes.

    Args:
        folder: where they are.
        labels: a table (CSV or JSONL), if the folders are not the classes.
        labelled: false: every sound in the folder and below, whatever folder it is in, and no labels.
        rate: resample what is at another rate to this one. Without it all must be at one rate.
        mono: mix what has several channels to one. Without it all must have as many.
        subtype: how to store them, ``PCM_16`` or ``FLOAT``.
        licence: to be shown with the dataset.

    Returns:
        The source. Files that cannot be opened, or differ from most in what is not converted, are its faults.

    Raises:
        DataError: no sounds, or labels that do not fit; see `mmlong.datamodules.listing`.
    """
    place = Path(folder)
    listing = list_files(place, labels, SUFFIXES, "sounds", labelled)
    rows = listing.files
    if labels is None and (place / "testing_list.txt").is_file():
        rows = _speech_commands(place, rows)
    storage, odd = common_storage([row.file for row in rows], rate, mono, subtype)
    rows = [row for row in rows if row.file not in odd]
    number = class_numbers(rows, labels or folder)
    records = [
        Record(row.file.relative_to(place).as_posix(), partial(pack_sound, row.file, row.file, storage),
               {"label": number[row.label]} if row.label else {}, row.extra, row.split)
        for row in rows
    ]  # fmt: skip
    return SequenceSource(
        name=place.resolve().name, modality="audio", extension="wav", about=storage.about, source=str(folder), licence=licence,
        records=records, labels={"label": tuple(number)} if number else {}, default_label="label" if number else None,
        length=storage.frames, faults=[*listing.faults, *odd.values()],
    )  # fmt: skip


def _speech_commands(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The same, split by the lists of Speech Commands, without its background noise."""
    splits = official_splits(folder)
    names = {row.file.relative_to(folder).as_posix(): row for row in rows}
    by_name = {name: row for name, row in names.items() if not name.startswith("_")}
    if missing := splits.keys() - by_name.keys():
        raise DataError(folder, f"its lists of splits name {len(missing)} files that are not there", min(missing))
    return [row._replace(split=splits.get(name, "train")) for name, row in by_name.items()]


def common_storage(
    files: Iterable[Path], rate: int | None, mono: bool, subtype: str
) -> tuple[Storage, dict[Path, DataError]]:
    """How files are stored, from their headers alone, and which of them cannot be: those that cannot be opened, or differ from most in what is not converted.

    Raises:
        BadSampleError: none of them can be opened.
    """
    found: dict[Path, tuple[int, int] | BadSampleError] = {}
    for file in files:
        try:
            found[file] = survey(file, file)
        except BadSampleError as error:
            found[file] = error
    rates: dict[int, list[Path]] = {}
    counts: dict[int, list[Path]] = {}
    for file, said in found.items():
        if not isinstance(said, BadSampleError):
            rates.setdefault(said[0], []).append(file)
            counts.setdefault(said[1], []).append(file)
    odd: dict[Path, DataError] = {file: said for file, said in found.items() if isinstance(said, BadSampleError)}
    if not rates:
        raise next(iter(odd.values()))
    most, channels = max(rates, key=lambda each: len(rates[each])), max(counts, key=lambda each: len(counts[each]))
    for file, said in found.items():
        if isinstance(said, BadSampleError):
            continue
        if rate is None and said[0] != most:
            odd[file] = BadSampleError(file, f"is at {said[0]:,} Hz and {_such(rates[most])} at {most:,} Hz; give a --rate to resample all of them to")  # fmt: skip
        elif not mono and said[1] != channels:
            odd[file] = BadSampleError(file, f"has {said[1]} channels and {_such(counts[channels])} has {channels}; mix all of them with --mono")  # fmt: skip
    return Storage(rate or most, 1 if mono else channels, subtype, resample=rate is not None, mix=mono), odd


def _such(files: Sequence[Path]) -> str:
    """The first of several files, and how many there are."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} (with {len(files) - 1} others)"


def torchaudio_source(
    name: str,
    root: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    rate: int | None = None,
    mono: bool = False,
    subtype: str = "PCM_16",
) -> SequenceSource:
    """A torchaudio dataset class by name, e.g. ``"SPEECHCOMMANDS"``, of whose files the class makes the list.

    Where the class knows ``subset`` and its training, validation and testing parts, these are the splits.

    Args:
        name: of the class; one that has ``get_metadata``.
        root: where its files are.
        options: further arguments of the class, e.g. ``{"url": "dev-clean"}``.
        rate, mono, subtype: see `sound_folder`.

    Raises:
        DataError: there is no such class, it does not list its files, or they are not there.
    """
    import torchaudio.datasets as zoo

    kind = getattr(zoo, name, None)
    if not inspect.isclass(kind):
        near = difflib.get_close_matches(name, zoo.__all__, n=1)
        raise DataError(f"torchaudio:{name}", "no such dataset class" + (f"; did you mean {near[0]}?" if near else ""))
    if not hasattr(kind, "get_metadata"):
        raise DataError(
            f"torchaudio:{name}", "does not list its files (it has no get_metadata); pack its folder instead"
        )
    accepted = inspect.signature(kind).parameters
    given = dict(options or {})
    if unknown := set(given) - set(accepted):
        raise DataError(
            f"torchaudio:{name}", f"does not take {', '.join(sorted(unknown))}; it takes {', '.join(accepted)}"
        )
    parts: Sequence[str | None] = [None]
    if name == "SPEECHCOMMANDS" and "subset" not in given:
        parts = ["training", "validation", "testing"]
    field, at = TORCHAUDIO_LABELS.get(name, (None, 0))
    rows: list[tuple[str, Path, str | None, str | None]] = []
    for part in parts:
        try:
            data: Any = kind(root, **given, **({} if part is None else {"subset": part}))
            listed = [data.get_metadata(item) for item in range(len(data))]
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise DataError(f"torchaudio:{name}", f"cannot be read from {root}: {error}") from error
        for metadata in listed:
            file = _find(str(metadata[0]), data, Path(root), f"torchaudio:{name}")
            label = None if field is None else str(metadata[at])
            rows.append((str(metadata[0]), file, label, None if part is None else _SUBSETS[part]))
    if not rows:
        raise DataError(f"torchaudio:{name}", f"lists no files in {root}")
    classes = tuple(sorted({label for _, _, label, _ in rows if label is not None}))
    number = {label: place for place, label in enumerate(classes)}
    storage, odd = common_storage([file for _, file, *_ in rows], rate, mono, subtype)

    def load(file: Path) -> Callable[[], bytes]:
        return partial(pack_sound, file, file, storage)

    return SequenceSource(
        name=name.lower(), modality="audio", extension="wav", about=storage.about, source=f"torchaudio.datasets.{name}",
        licence="see the dataset's own page",
        records=[
            Record(path, load(file), {} if field is None or label is None else {field: number[label]}, {}, split)
            for path, file, label, split in rows
            if file not in odd
        ],
        labels={} if field is None else {field: classes}, default_label=field, length=storage.frames, faults=list(odd.values()),
    )  # fmt: skip


def _find(path: str, data: Any, root: Path, name: str) -> Path:
    """A listed file: its path is relative to a folder that each class names in its own way."""
    folders = [
        root,
        *(Path(getattr(data, own)) for own in ("_path", "_archive", "root_dir", "_root") if hasattr(data, own)),
    ]
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    raise DataError(name, f"lists a file that is not in {' or '.join(str(folder) for folder in folders)}", path)
