"""Run folders, ``runs/RECIPE/TIMESTAMP/``, and which checkpoint ``--ckpt_path`` means."""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError
from mmlong.results import write_json
from mmlong.runs import CHECKPOINTS, is_run, model_folder, names_of_runs, runs_in, runs_of

BEST = "best.ckpt"
STORY = "run.json"
_ENV = "MMLONG_RUN_DIR"


@dataclass(frozen=True)
class Resumed:
    """A checkpoint and the run it belongs to (``None`` for a lone file)."""

    checkpoint: Path
    run: Path | None


def run_of(checkpoint: Path) -> Path | None:
    """The run folder a checkpoint lies in."""
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == CHECKPOINTS and is_run(folder) else None


def saved_model(what: str, root: Path) -> tuple[Any, Path]:
    """The saved model of a run folder, a folder of a saved model, or a recipe's newest finished run; and its folder.

    Raises:
        CommandError: there is none, or it is damaged.
    """
    from mmlong.models import load_model

    folder = model_folder(what, root)
    if folder is None:
        raise CommandError(
            f"{what}: no such folder, and no finished run of a recipe of this name under {root}/; train one with `mmlong fit -c {what}`"
        )
    try:
        return load_model(folder).eval(), folder
    except FileNotFoundError as error:
        raise CommandError(str(error), status=1) from error
    except ValueError as error:
        raise CommandError(str(error), status=1) from error


def saved_autoregressive(what: str, root: Path) -> tuple[Any, Path]:
    """As :func:`saved_model`, of a model that predicts the next token.

    Raises:
        CommandError: there is none, it is damaged, or it is of another kind.
    """
    from mmlong.models import AutoregressiveModel, JointModel

    model, folder = saved_model(what, root)
    if isinstance(model, JointModel):
        raise CommandError(f"{folder} holds a joint model, of {', '.join(model.names)}; this is for models of one modality", status=1)  # fmt: skip
    if not isinstance(model, AutoregressiveModel):
        raise CommandError(
            f"{folder} holds a model of kind {model.config.get('kind', 'plain')!r}, which has no next token: train one with mmlong.tasks.AutoregressTask (`mmlong recipes '*_ar'`)",
            status=1,
        )
    return model, folder


def resolve_run(what: str, root: Path) -> Path | None:
    """The run folder that ``--ckpt_path`` names or lies in, or the newest of that name, if there is one, before any recipe is known."""
    path = Path(what)
    if is_run(path):
        return path
    if path.is_file():
        return run_of(path)
    return next(iter(runs_in(path) or runs_of(what, root)), None)


def resolve_checkpoint(what: str, recipe: str, root: Path) -> Resumed:
    """What ``--ckpt_path`` means.

    Args:
        what: ``last`` or ``best`` of the recipe's newest run, a run folder (its last), a folder of runs or their name (the newest one's last), or a file.
        recipe: whose runs to look through.
        root: where the runs are.

    Raises:
        CommandError: it is a URL, there is none, or none that is whole.
    """
    from mmlong.training.checkpoints import newest_whole

    if "://" in what:
        raise CommandError(f"--ckpt_path {what}: checkpoints are read from files only; fetch it first, if you trust it")
    if what in ("last", "best"):
        runs = runs_of(recipe, root)
        if not runs:
            others = names_of_runs(root)
            called = f"; there are runs called {', '.join(others[:8])}: -c takes such a name too" if others else ""
            raise CommandError(
                f"--ckpt_path {what}: no run of {recipe} with a checkpoint under {root / recipe}; "
                f"start one with `mmlong fit -c {recipe}`{called}"
            )
        # A run that was stopped before its first checkpoint does not hide the one before it.
        run = runs[0]
    elif Path(what).is_file():
        return Resumed(_whole(Path(what)), run_of(Path(what)))
    elif (Path(what) / CHECKPOINTS).is_dir():
        run = Path(what)
    elif found := resolve_run(what, root):
        run = found
    elif Path(what).is_dir():
        raise CommandError(f"--ckpt_path {what}: no run folder (it has no {CHECKPOINTS}/)")
    else:
        raise CommandError(f"--ckpt_path {what}: no such file or run folder ('last' means the newest run of {recipe})")
    if what == "best":
        path = run / CHECKPOINTS / BEST
        if not path.is_file():
            raise CommandError(f"--ckpt_path best: {run} has no {BEST}; it was not evaluated yet. Use last")
        return Resumed(_whole(path), run)
    path_or_none, torn = newest_whole(run / CHECKPOINTS)
    for bad in torn:
        print(f"{bad} is damaged and left aside")
    if path_or_none is None:
        raise CommandError(f"--ckpt_path {what}: {run} holds no whole checkpoint", status=1)
    return Resumed(path_or_none, run)


def _whole(path: Path) -> Path:
    from mmlong.training.checkpoints import BadCheckpointError, read_checkpoint

    try:
        read_checkpoint(path)
    except BadCheckpointError as error:
        raise CommandError(f"--ckpt_path: {error}", status=1) from error
    return path


def new_run(recipe: str, root: Path, given: str | None) -> Path:
    """A fresh run folder, made now. Ranks that a first process starts share its choice.

    Raises:
        CommandError: the given folder has a run in it, or several processes would each choose their own.
    """
    inherited = os.environ.get(_ENV) if "LOCAL_RANK" in os.environ else None
    if inherited is not None:
        return Path(inherited)
    if given is not None:
        run = Path(given)
        if is_run(run):
            raise CommandError(f"--run_dir {run} holds a run already; go on with --ckpt_path {run}, or name another")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError("several processes were started from outside: give all of them the same --run_dir")
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run, number = root / recipe / stamp, 1
        while run.exists():
            number += 1
            run = root / recipe / f"{stamp}-{number}"
    try:
        (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make the run folder {run}: {error.strerror}", status=1) from error
    os.environ[_ENV] = str(run)
    return run


def tell_story(run: Path, part: dict[str, Any], told: dict[str, Any]) -> None:
    """Write ``run.json``: what the run was to be, and every command that worked on it; a report needs it where the run did not come to its end.

    Args:
        run: its folder.
        part: what is true of this command: when it began, on which machine, from which checkpoint.
        told: what is true of the run, the recipes and the data; that of its first command stays.
    """
    path = run / STORY
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
        parts = list(before.get("parts", []))
    except (ValueError, AttributeError, TypeError, OSError):
        print(f"{path} is damaged and written anew")
        before, parts = {}, []
    write_json(path, {**told, **before, "parts": [*parts, part]})


def command_line(arguments: list[str]) -> str:
    """A command as it can be pasted into a shell."""
    return shlex.join(arguments)
