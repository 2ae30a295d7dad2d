"""Simple models that are computed and not trained by gradient: counts with a linear model or boosted trees, compressors, Markov models.

    python -m mmlong.experiments.minutes.simple genome/binding200 boosting kmers --minutes 12
    python -m mmlong.experiments.minutes.simple text/stdlib_ar ppmd primed

=====================  =============================================================================================================
``linear FEATURES``    logistic regression on standardised features
``boosting FEATURES``  gradient-boosted trees (scikit-learn's ``HistGradientBoostingClassifier``)
``bz2``, ``xz``        the test documents, each by itself; ``primed``: all of them, given the training documents, as bits(train and test) - bits(train)
``ppmd``               the same by PPMd variant H (Shkarin 2002), 512 MB of model
``markov``             the best Markov model of a chromosome, any order (:mod:`mmlong.experiments.floors.markov`)
``png``, ``webp``      lossless files of the test crops
=====================  =============================================================================================================

Features: ``kmers`` (words of DNA), ``thumbnails`` (32 x 32), ``mfcc`` (means and deviations), ``char_ngrams`` (TF-IDF). On the recipe's own splits; settings are tried on validation one after another for as long as the minutes last, and the test set is looked at once.
Nothing here is drawn, so there are no seeds. Needs ``pip install 'mmlong[floors]'``: scikit-learn, pyppmd.
"""

from __future__ import annotations

import bz2
import json
import lzma
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmlong.datamodules.known import find_source, known_sequences
from mmlong.datamodules.splits import split_items
from mmlong.experiments.command import experiment_parser

from mmlong.cli.recipes import load_recipes

MARK = "mmlong-simple: "
"""Begins the line that holds the result."""
SPLITS = ("train", "val", "test")
EXTRA = "pip install 'mmlong[floors]'"
ORDERS = {"text": (5, 6, 8, 12, 4, 16), "genome": (12, 16, 8, 24, 32)}
"""Of PPMd, the likely ones first."""
MEMORY = 1 << 29
STRENGTHS = (1e-1, 1e-2, 1.0, 1e-3, 10.0, 1e-4, 100.0)
TREES: tuple[dict[str, Any], ...] = (
    {"learning_rate": 0.1, "max_iter": 200},
    {"learning_rate": 0.05, "max_iter": 400, "max_leaf_nodes": 15},
    {"learning_rate": 0.1, "max_iter": 200, "max_leaf_nodes": 7},
    {"learning_rate": 0.1, "max_iter": 400, "l2_regularization": 1.0},
)

Parts = dict[str, tuple[Any, np.ndarray]]
"""By split, features ``(N, F)`` and labels ``(N,)``."""


@dataclass
class Clock:
    """CPU minutes for trying settings; the first is always tried."""

    minutes: float | None = None

    def while_it_lasts(self, settings: Iterable[Any]) -> Iterable[Any]:
        """The settings, until another one as long as the longest so far would not fit."""
        longest = 0.0
        for number, setting in enumerate(settings):
            begun = time.process_time()
            if number and self.minutes is not None and begun + longest > 60 * self.minutes:
                return
            yield setting
            longest = max(longest, time.process_time() - begun)


def accuracies(truth: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """``accuracy`` over samples, and ``balanced_accuracy`` over the classes that occur."""
    right = truth == said
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean([right[truth == one].mean() for one in np.unique(truth)])),
    }


def classify(
    parts: Parts, models: Iterable[tuple[str, Callable[[], Any]]], metric: str, clock: Clock
) -> tuple[dict[str, float], str]:
    """Fit each model on training, choose on validation, test.

    Args:
        parts: features and labels of the three splits.
        models: each with its name and a maker of something with ``fit`` and ``predict``.
        metric: of :func:`accuracies`, by which one is chosen; of equal ones the first.
        clock: how long.

    Returns:
        metrics of the chosen one, ``val/...`` and ``test/...``, and its name.
    """
    best: tuple[float, str, Any] | None = None
    for name, make in clock.while_it_lasts(models):
        model = make().fit(*parts["train"])
        val = accuracies(parts["val"][1], model.predict(parts["val"][0]))[metric]
        print(f"  {name}: val {metric} {val:.4f}", flush=True)
        if best is None or val > best[0]:
            best = (val, name, model)
    assert best is not None
    _, name, model = best
    found = {}
    for split in ("val", "test"):
        x, truth = parts[split]
        found |= {f"{split}/{key}": value for key, value in accuracies(truth, model.predict(x)).items()}
    return found, name


def linear_models(balanced: bool) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Logistic regression of each strength."""
    from sklearn.linear_model import LogisticRegression

    weight = "balanced" if balanced else None
    for strength in STRENGTHS:
        yield f"C {strength:g}", lambda C=strength: LogisticRegression(C=C, max_iter=1000, class_weight=weight)  # type: ignore[misc]


def boosted_trees(balanced: bool) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Gradient boosting of each setting; without early stopping, which would draw a part of the training data."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    weight = "balanced" if balanced else None
    for setting in TREES:
        told = ", ".join(f"{key} {value:g}" for key, value in setting.items())
        yield (
            told,
            lambda s=setting: HistGradientBoostingClassifier(
                **s, early_stopping=False, class_weight=weight, random_state=0
            ),
        )  # type: ignore[misc]


# Features


def records_of(init: Mapping[str, Any], source: str | None) -> dict[str, list[Any]]:
    """The records of a recipe's known source by split, as packing divides them, each split by name."""
    known = known_sequences(init["dataset"])
    parts = split_items(known.load(find_source(known, source)).records, known.splits, 0)
    return {split: sorted(parts[split], key=lambda record: record.name) for split in parts}


def features(name: str, boosted: bool, init: Mapping[str, Any], source: str | None) -> Parts:
    """Features and labels of the splits of a recipe's data."""
    if name == "thumbnails":
        from mmlong.datamodules.images import ImageDataModule
        from mmlong.experiments.floors.thumbnails import thumbnails

        data = ImageDataModule(init["dataset"], root=init.get("root"), label=init.get("label"))
        data.prepare_data()
        return {split: thumbnails(data, split, 32) for split in SPLITS}
    records = records_of(init, source)
    field = init.get("label") or next(iter(known_sequences(init["dataset"]).labels))
    labels = {split: np.array([record.labels[field] for record in records[split]]) for split in SPLITS}
    if name == "kmers":
        from mmlong.experiments.floors.kmers import features as words

        # Trees are slow on thousands of rare words.
        sizes = (2, 3, 4) if boosted else (3, 4, 5, 6)
        both = "reverse_complement" in init.get("augment", ())
        found: dict[str, Any] = {split: words(records[split], sizes, both) for split in SPLITS}
    elif name == "mfcc":
        from mmlong.experiments.floors.mfcc import features as means

        rate = int(known_sequences(init["dataset"]).about["rate"])
        found = {split: means(records[split], rate, True) for split in SPLITS}
    else:
        from sklearn.feature_extraction.text import TfidfVectorizer

        made = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), max_features=200_000, sublinear_tf=True)
        texts = {split: [record.load().decode() for record in records[split]] for split in SPLITS}
        made.fit(texts["train"])
        found = {split: made.transform(texts[split]) for split in SPLITS}
    return {split: (found[split], labels[split]) for split in SPLITS}


def standardised(parts: Parts) -> Parts:
    """Features of mean 0 and deviation 1 over training; sparse ones as they are."""
    x = parts["train"][0]
    if not isinstance(x, np.ndarray):
        return parts
    mean, scale = x.mean(0), x.std(0) + 1e-6
    return {split: ((one - mean) / scale, labels) for split, (one, labels) in parts.items()}


# Compressors


def ppmd(data: bytes, order: int) -> int:
    """Bytes of PPMd variant H."""
    import pyppmd

    return len(pyppmd.compress(data, max_order=order, mem_size=MEMORY, variant="H"))


def xz(data: bytes, order: int) -> int:
    """Bytes of LZMA without a container, its window as large as the data."""
    window = 1 << max(16, min(30, (len(data) - 1).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


COMPRESSORS: dict[str, Callable[[bytes, int], int]] = {"ppmd": ppmd, "xz": xz, "bz2": lambda data, order: len(bz2.compress(data, 9))}  # fmt: skip


def bits_each(size: Callable[[bytes], int], documents: Sequence[bytes], given: Sequence[bytes]) -> float:
    """Bits a byte of documents by themselves, or (``given``) of all of them behind others that cost nothing."""
    total = sum(map(len, documents))
    if given:
        before = b"".join(given)
        return 8 * (size(before + b"".join(documents)) - size(before)) / total
    return 8 * sum(map(size, documents)) / total


def compress(
    name: str, primed: bool, records: Mapping[str, Sequence[bytes]], orders: Sequence[int], clock: Clock
) -> tuple[dict[str, float], str]:
    """Bits a byte of validation and test; PPMd's order is chosen on validation."""
    function, given = COMPRESSORS[name], records["train"] if primed else ()

    def bits(split: str, order: int) -> float:
        return bits_each(lambda data: function(data, order), records[split], given)

    found: list[tuple[float, int]] = []
    for order in clock.while_it_lasts(orders if name == "ppmd" else (0,)):
        found.append((bits("val", order), order))
        print(f"  {name}{f' of order {order}' if order else ''}: val {found[-1][0]:.4f} bits", flush=True)
    val, order = min(found)
    return {"val/bits": val, "test/bits": bits("test", order)}, f"order {order}" if order else ""


def run(
    recipe: str, words: Sequence[str], minutes: float | None = None, source: str | None = None
) -> tuple[dict[str, float], str]:
    """A simple model on a recipe's data: its metrics, ``val/...`` and ``test/...``, and what was chosen.

    Raises:
        ValueError: no such model.
        ImportError: a package is missing.
    """
    config = load_recipes([recipe])
    init, clock = config["data"]["init_args"], Clock(minutes)
    name, *rest = words
    if name in ("linear", "boosting"):
        boosted, balanced = name == "boosting", config["model"]["init_args"].get("class_weights") == "balanced"
        parts = features(rest[0], boosted, init, source)
        models = boosted_trees(balanced) if boosted else linear_models(balanced)
        metric = "balanced_accuracy" if balanced else "accuracy"
        return classify(parts if boosted else standardised(parts), models, metric, clock)
    if name in COMPRESSORS:
        records = {split: [r.load() for r in part] for split, part in records_of(init, source).items()}
        modality = config["model"]["init_args"]["modality"]["name"]
        return compress(name, rest == ["primed"], records, ORDERS.get(modality, ORDERS["text"]), clock)
    if name == "markov":
        from mmlong.experiments.floors.markov import best_fit

        fit = best_fit(init["dataset"])
        return {"val/bits": fit.val, "test/bits": fit.test}, f"order {fit.order}, {fit.kind}"
    if name in ("png", "webp"):
        from mmlong.experiments.floors.lossless_images import bits_per_dimension

        key = {"png": "PNG", "webp": "WebP lossless"}[name]
        side = int(init.get("size") or 64)
        return {f"{split}/bits": bits_per_dimension(side, split)[key]["all"] for split in ("val", "test")}, ""
    raise ValueError(f"there is no simple model {' '.join(words)!r}")


def main(argv: list[str] | None = None) -> int:
    """Command line; the result is a marked line of JSON."""
    parser = experiment_parser("minutes.simple", __doc__)
    parser.add_argument("recipe")
    parser.add_argument("words", nargs="+", metavar="MODEL", help="e.g. boosting kmers; ppmd primed")
    parser.add_argument("--minutes", type=float, help="CPU minutes for trying settings (default: all of them)")
    parser.add_argument("--source", help="the data's folder or file, if it comes in no package")
    args = parser.parse_args(argv)
    try:
        metrics, chosen = run(args.recipe, args.words, args.minutes, args.source)
    except ImportError as error:
        print(f"{' '.join(args.words)} needs {error.name or error}: {EXTRA}", file=sys.stderr)
        return 1
    minutes = round(time.process_time() / 60, 3)
    print(MARK + json.dumps({"metrics": metrics, "chosen": chosen, "cpu_minutes": minutes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
