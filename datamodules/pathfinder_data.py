"""`PathfinderDataModule`: Pathfinder's pictures, drawn when they are asked for, or read from the benchmark's own release.

A drawn picture is a pure function of ``picture_seed``, split and place, whatever worker or rank asks for it, and no file is needed; see `mmlong.datamodules.pathfinder`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .direct_images import DirectImageDataModule, DirectImages, DirectSplit, Facts
from .draws import labels_of
from .errors import DataError
from .order import random_words
from .pathfinder import draw_picture
from .pathfinder_files import LEVELS, PathfinderFiles
from .pathfinder_shapes import SIZES, Pathfinder

COUNTS = {"train": 160_000, "val": 20_000, "test": 20_000}
"""The benchmark's."""
SEED = 2018
LABELS = {"connected": ("apart", "connected")}
DRAWN = Facts(
    LABELS,
    "Pathfinder of the Long Range Arena, drawn here after the published generator (Linsley et al. 2018; Tay et al. 2021)",
    "what is drawn here belongs to nobody",
)
RELEASED = Facts(
    LABELS, "Pathfinder, the Long Range Arena's own release (Tay et al. 2021)", "Apache-2.0 (the benchmark's files)"
)


class DrawnPictures(DirectImages):
    """Pictures by split and place.

    Args:
        parameters: how each is drawn.
        counts: pictures of each split.
        seed: of all.
        train_paddles: lengths of paths that training begins with, and for how many epochs each is the longest; then ``parameters.paddles``. Short paths are a third as long.
    """

    def __init__(
        self, parameters: Pathfinder, counts: dict[str, int], seed: int, train_paddles: Mapping[int, int] | None = None
    ) -> None:
        self.parameters, self.counts, self.seed = parameters, counts, seed
        self._splits: dict[str, DirectSplit] = {}
        stages = sorted((train_paddles or {}).items())
        self.until = np.cumsum([epochs for _, epochs in stages], dtype=np.int64)
        self.lengths = [
            *(dataclasses.replace(parameters, paddles=n, distractor_paddles=n // 3) for n, _ in stages), parameters,
        ]  # fmt: skip
        self._shown: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        told = f"2 {parameters} {counts} {seed} {stages}"
        super().__init__(
            (1, parameters.size, parameters.size), tuple(counts), hashlib.sha256(told.encode()).hexdigest()
        )

    def key(self, split: str) -> tuple[int, int]:
        """Seed and number of a split."""
        if split not in self.counts:
            raise DataError("pathfinder", f"has splits {', '.join(self.counts)}", f"split {split!r}")
        return self.seed, tuple(COUNTS).index(split)

    def split(self, name: str) -> DirectSplit:
        """Labels."""
        key = self.key(name)
        if name not in self._splits:
            self._splits[name] = DirectSplit({"connected": labels_of(self.counts[name], *key)})
        return self._splits[name]

    def variants(self, split: str) -> int:
        """A picture of each length in training."""
        return len(self.lengths) if split == "train" else 1

    def variant(self, split: str, epoch: int, place: int) -> int:
        """The newest length for two places of three, any of the earlier ones for the third: what was learned is not forgotten."""
        if split != "train":
            return 0
        newest = int(self.until.searchsorted(epoch, side="right"))
        if newest == 0:
            return 0
        if self._shown[0] != epoch:
            words = random_words(self.counts[split], *self.key(split), 2, epoch)
            earlier = (words >> np.uint64(11)).astype(np.int64) % (3 * newest)
            self._shown = epoch, np.where(earlier < newest, earlier, newest)
        return int(self._shown[1][place])

    def drawn_by(self, split: str, variant: int) -> Pathfinder:
        """How a picture is drawn."""
        return self.lengths[variant] if split == "train" else self.parameters

    def image(self, split: str, place: int, variant: int = 0) -> np.ndarray:
        """A picture."""
        label = int(self.split(split).labels["connected"][place])
        return draw_picture(self.drawn_by(split, variant), label, *self.key(split), 0, place).pixels[None]


class PathfinderDataModule(DirectImageDataModule):
    """Pathfinder at a size.

    Args:
        size: 32, 64, 128 (Path-X) or 256.
        source_path: the benchmark's release, or its folder of this size: its pictures are read instead of drawn.
        level: of the release's pictures, ``hard`` (what everyone reports), ``intermediate`` or ``easy``.
        parameters: changes to how pictures are drawn, fields of `mmlong.datamodules.pathfinder.Pathfinder`.
        train_count, val_count, test_count: how many are drawn; the benchmark's own, unless given.
        train_paddles: a curriculum, e.g. ``{3: 4, 6: 8}``: the long paths of training pictures have 3 dashes for 4 epochs, then 6 for 8, then the benchmark's own length (and a third of the pictures any of the lengths before it). Not the benchmark's training data, whose length alone it is unless given.
        picture_seed: another gives other pictures.
        seed, batch_size, num_workers, augment, cache, on_bad, eval_batch_size: see `mmlong.datamodules.images.ImageDataModule`.

    Raises:
        DataError: at use, if files are missing or wrong.
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        size: int = 32,
        source_path: str | None = None,
        level: str = "hard",
        parameters: dict[str, Any] | None = None,
        train_count: int = COUNTS["train"],
        val_count: int = COUNTS["val"],
        test_count: int = COUNTS["test"],
        train_paddles: dict[int, int] | None = None,
        picture_seed: int = SEED,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        augment: Sequence[str] = (),
        on_bad: str = "stop",
        cache: bool = False,
        eval_batch_size: int | None = None,
    ) -> None:
        if size not in SIZES:
            raise ValueError(f"pathfinder has sizes {', '.join(map(str, SIZES))}, got {size}")
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; it can be {', '.join(LEVELS)}")
        if source_path is not None and (parameters or train_paddles):
            raise ValueError(
                "parameters and train_paddles are of pictures that are drawn, and source_path has some already"
            )
        if source_path is None and level != "hard":
            raise ValueError(
                "level is of the release's pictures; of drawn ones say parameters: {paddles: 9, distractor_paddles: 3}"
            )
        known = {f.name for f in dataclasses.fields(Pathfinder)} - {"size"}
        if unknown := set(parameters or ()) - known:
            raise ValueError(f"pathfinder has no parameter {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}")
        self.counts = {"train": train_count, "val": val_count, "test": test_count}
        if min(self.counts.values()) < 1 or picture_seed < 0:
            raise ValueError("pathfinder: counts are at least 1, picture_seed at least 0")
        self.parameters = dataclasses.replace(SIZES[size], **(parameters or {}))
        for paddles, epochs in (train_paddles or {}).items():
            if not 3 <= paddles < self.parameters.paddles or epochs < 1:
                raise ValueError(
                    f"pathfinder: train_paddles are lengths from 3 to {self.parameters.paddles - 1}, each with how many epochs it has (at least 1), got {paddles}: {epochs}"
                )
        self.source_path, self.level = source_path, level
        self.train_paddles, self.picture_seed = dict(train_paddles or {}), picture_seed
        super().__init__(
            f"pathfinder{size}", DRAWN if source_path is None else RELEASED, (1, size, size), source_path, augment, cache,
            batch_size, num_workers, seed, on_bad, eval_batch_size,
        )  # fmt: skip

    def open(self) -> DirectImages:
        """Drawn, or the release's."""
        if self.source_path is not None:
            return PathfinderFiles(self.source_path, self.shape[1], self.level)
        return DrawnPictures(self.parameters, self.counts, self.picture_seed, self.train_paddles)
