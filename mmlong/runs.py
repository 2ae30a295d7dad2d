"""What a run folder is, ``runs/RECIPE/TIMESTAMP/``, and which one a recipe's name means. This file imports nothing of the house.

A run that is over holds its model (``config.json``, ``model.safetensors``): averaged weights where it averaged them, those of the best step where it was told to end with them.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
MODEL = "model.safetensors"


def is_run(folder: Path) -> bool:
    """Whether this is a run folder."""
    return (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()


def runs_of(recipe: str, root: Path) -> list[Path]:
    """The recipe's run folders that hold a checkpoint, newest first."""
    return runs_in(root / recipe)


def runs_in(folder: Path) -> list[Path]:
    """The run folders in a folder that hold a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_run(path) and any((path / CHECKPOINTS).glob("*.ckpt"))]
    return sorted(found, key=lambda path: path.name, reverse=True)


def model_folder(what: str | Path, root: str | Path = "runs") -> Path | None:
    """The folder of a saved model: what is named if it is a folder, else the newest run of the recipe of that name that is over; ``None`` if there is neither.

    Args:
        what: a run folder, a folder of a saved model, a folder of runs (its newest that is over), or a recipe's name.
        root: where run folders are.
    """
    folder = Path(what)
    inside = folder.is_dir() and not is_run(folder) and not (folder / MODEL).is_file()
    runs = runs_in(folder) if inside else [] if folder.is_dir() else runs_of(str(what), Path(root))
    newest = next((run for run in runs if (run / MODEL).is_file()), None)
    return newest or (folder if folder.is_dir() else None)


def names_of_runs(root: str | Path = "runs") -> list[str]:
    """What the runs under a root are called, for commands that want such a name."""
    found = (path for depth in ("*", "*/*", "*/*/*") for path in Path(root).glob(f"{depth}/{CHECKPOINTS}"))
    return sorted({path.parent.parent.relative_to(root).as_posix() for path in found if any(path.glob("*.ckpt"))})


def is_packaged_recipe(name: str) -> bool:
    """Whether a recipe of this name comes with mmlong."""
    parts = name.removesuffix(".yaml").split("/")
    if any(part in ("", "..", ".") for part in parts):
        return False
    return any(
        files(package).joinpath(*parts[:-1], f"{parts[-1]}.yaml").is_file()
        for package in ("mmlong.configs", "mmlong.experiments")
    )
