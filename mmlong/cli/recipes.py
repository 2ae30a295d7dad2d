"""Recipes: YAML files by path or by name, merged left to right.

``image/cells256`` is looked for as a real file first, then among the packaged ``mmlong.configs``, then in
``mmlong.experiments``, then in other people's packages: an entry point ``acme = "acme_models.recipes"`` of the group ``mmlong.recipes`` names a package whose YAML files are the
recipes ``acme/...``. Mappings are merged key by key; anything else (lists too) is replaced by the later file's.
Files are read with YAML's safe loader; the classes they name are imported later, so a recipe is code: run those you trust.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from mmlong.cli.errors import CommandError
from mmlong.registry import nearest

PACKAGES = ("mmlong.configs", "mmlong.experiments")
GROUP = "mmlong.recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a word; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _walk(folder: Traversable, prefix: str = "") -> dict[str, Traversable]:
    found: dict[str, Traversable] = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            found |= _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            found[prefix + entry.name.removesuffix(".yaml")] = entry
    return found


def others() -> dict[str, Traversable]:
    """Name to file of every recipe of other people's packages, after the name of its entry point."""
    found: dict[str, Traversable] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            found |= _walk(files(point.value), f"{point.name}/")
        except (ImportError, TypeError, OSError) as error:
            # One broken package of somebody's must not take every other recipe down with it.
            warnings.warn(
                f"recipes of plug-in {point.name} ({point.value}) cannot be listed: {error}; the entry point names a package, a folder with an __init__.py",
                stacklevel=2,
            )
    return found


def packaged() -> dict[str, Traversable]:
    """Name to file of every recipe that is installed; mmlong's configs hide its experiments, and both other people's recipes, of the same name."""
    found = others()
    for package in reversed(PACKAGES):
        found |= _walk(files(package))
    return dict(sorted(found.items()))


SIZES = (".debug", ".paper")
"""Ends of the names of recipes that are no recipes of their own, but go on top of one."""


def main_recipes() -> list[str]:
    """Names of the packaged recipes without their other sizes."""
    return [name for name in packaged() if not name.endswith(SIZES)]


def load_recipe(name: str) -> tuple[str, dict[str, Any]]:
    """A recipe's name and its content.

    Args:
        name: a path, or the name of a packaged recipe (with or without ``.yaml``).

    Raises:
        CommandError: there is none, or it is no YAML mapping.
    """
    source: Traversable
    if Path(name).is_file():
        source, title = Path(name), Path(name).stem
    else:
        known = packaged()
        title = name.removesuffix(".yaml")
        if title not in known:
            raise CommandError(
                f"no recipe {name!r}{nearest(title, known)}: there is no such file, and the packaged recipes are "
                f"{', '.join(main_recipes())}"
            )
        source = known[title]
    try:
        content = yaml.load(source.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise CommandError(f"{source} is no YAML: {' '.join(str(error).split())}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise CommandError(f"{source} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{source} is no recipe: it holds {type(content).__name__}, not keys with values")
    return title, content


def merge(base: Any, over: Any) -> Any:
    """``over`` on top of ``base``; another ``class_path`` replaces the whole entry, since its arguments are its own."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "class_path" in base and over.get("class_path", base["class_path"]) != base["class_path"]:
        return over
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}


def load_recipes(names: list[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Several recipes merged left to right; ``recipe`` (the name of the run) is the first one's unless a file sets it.

    Where a later file, or ``overrides``, names another dataset, what was said of the one before (its label, the size to pack it at) is left out, and that is told.
    """
    config: dict[str, Any] = {}
    for name in names:
        title, content = load_recipe(name)
        data = content.get("data")
        arguments = data.get("init_args") if isinstance(data, dict) else None
        if isinstance(arguments, dict):
            config = _of_another(config, arguments.get("dataset"))
        config = merge(config, content)
        config.setdefault("recipe", title)
    from mmlong.cli.train import pairs

    given = [value for key, value in pairs(list(overrides)) if key in ("data.dataset", "data.init_args.dataset")]
    return _of_another(config, given[-1] if given else None)


def _of_another(config: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """The configuration for another dataset: without those options of its datamodule that speak of the one it names (``of_dataset``)."""
    data = config.get("data")
    arguments = data.get("init_args") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(arguments, dict) or dataset is None:
        return config
    if arguments.get("dataset") in (None, dataset):
        return config
    module, _, name = str(data.get("class_path")).rpartition(".")
    try:
        options = getattr(getattr(importlib.import_module(module), name, None), "of_dataset", ())
    except (ImportError, ValueError):
        return config  # told by whoever builds it
    left = [f"data.{option} {arguments[option]}" for option in options if arguments.get(option) is not None]
    if left:
        print(f"{', '.join(left)} is left out: it is of {arguments['dataset']}, and data.dataset is {dataset}", file=sys.stderr)  # fmt: skip
    kept = {option: value for option, value in arguments.items() if option not in options}
    return {**config, "data": {**data, "init_args": kept}}


def run_recipes(argv: list[str]) -> int:
    """``mmlong recipes``: names and first comment line of the packaged recipes."""
    parser = argparse.ArgumentParser(prog="mmlong recipes", description="List the packaged recipes.")
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'image/*'")
    pattern = parser.parse_args(argv).pattern
    import fnmatch

    known = packaged()
    names = fnmatch.filter(known, pattern)
    if not names:
        raise CommandError(f"no recipe matches {pattern!r}; recipes: {', '.join(known)}", status=1)
    width = max(map(len, names))
    for name in names:
        first = known[name].read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())
    return 0
