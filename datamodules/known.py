"""The sequence sources that have a name, and where what a user gives for them is looked for.

Each is in a module beside this one, as a `KnownSequences` called ``KNOWN`` (a dict of them by name where the module has several); it is imported when the
source is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib import import_module
from pathlib import Path

from .errors import DataError
from .genome_tasks import GENOMIC_BENCHMARKS, NUCLEOTIDE_TRANSFORMER
from .records import KnownSequences

MODULES: dict[str, str] = {
    "stdlib": "stdlib",
    "bible": "bible",
    "news": "news",
    "imdb": "imdb",
    "listops": "listops",
    "listops-graded": "listops",
    "listops-lra": "listops",
    "fsdd": "fsdd",
    **{f"fsdd-without-{speaker}": "fsdd" for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")},
    "foxdot": "foxdot",
    **dict.fromkeys(("speech-commands-10", "speech-commands-35"), "speech_commands"),
    "waves": "waves",
    "digit-points": "digit_points",
    "digit-series": "digit_series",
    "pans": "pans",
    "clips": "clips",
    "chorales": "chorales",
    "chromosome": "chromosome",
    "binding": "binding",
    "families": "families",
    "families-transcripts": "families",
    **dict.fromkeys(("enwik8", "text8", "pg19"), "corpora"),
    **{f"gb-{task}": "genome_benchmarks" for task in GENOMIC_BENCHMARKS},
    **{f"nt-{task}": "genome_benchmarks" for task in NUCLEOTIDE_TRANSFORMER},
}


def known_names(modality: str | None = None) -> tuple[str, ...]:
    """Names of the known sources, of one modality or of all."""
    return tuple(name for name in MODULES if modality is None or known_sequences(name).modality == modality)


def known_sequences(name: str) -> KnownSequences:
    """A known source by name.

    Raises:
        DataError: there is none of that name.
    """
    if name not in MODULES:
        raise DataError(name, f"is no known source; there are {', '.join(MODULES)}")
    known = import_module(f"{__package__}.{MODULES[name]}").KNOWN
    return known[name] if isinstance(known, dict) else known


def is_known(dataset: str, known: Collection[str]) -> bool:
    """Whether what was named as a dataset is a known source, and not a folder.

    Raises:
        ValueError: it is the name of both: nobody's own pictures are to be taken for those of an installed package.
    """
    if dataset not in known:
        return False
    if Path(dataset).is_dir():
        raise ValueError(
            f"{dataset} is a known dataset, and there is a folder of this name here: ./{dataset} means the folder; to mean the known one, rename the folder"
        )
    return True


def data_root() -> Path:
    """Where datasets are kept unless told: ``$MMLONG_DATA``, else ``.data`` in the current folder."""
    return Path(os.environ.get("MMLONG_DATA") or ".data")


def find_source(known: KnownSequences, given: str | Path | None, root: str | Path | None = None) -> str | None:
    """The files of a source that comes in no package: what the user gave, else what lies in ``root`` (or `data_root`) under its name.

    Raises:
        DataError: what the user gave is not there.
    """
    if given is not None:
        if not Path(given).exists():
            raise DataError(given, "is missing")
        return str(given)
    folder = data_root() if root is None else Path(root)
    return next((str(folder / name) for name in known.files if (folder / name).exists()), None)
