"""``data`` and ``model`` of a recipe, without a trainer: for commands that look at a recipe's parts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mmlong.cli.errors import CommandError
from mmlong.cli.train import pairs

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from jsonargparse import ArgumentParser, Namespace

    from mmlong.tasks import Task


def parse(config: dict[str, Any], overrides: list[str]) -> tuple[ArgumentParser, Namespace]:
    """``data`` and ``model`` of a recipe and the parser that builds them, as ``fit`` does."""
    import lightning.pytorch as pl
    from jsonargparse import ArgumentError, ArgumentParser

    from mmlong.cli.engine import describe_data, plain
    from mmlong.tasks import Task

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=True)
    parser.add_subclass_arguments(Task, "model", required=True)
    parser.link_arguments("data", "model.init_args.data_info", compute_fn=describe_data, apply_on="instantiate")
    given = [f"--{part}={json.dumps(config[part])}" for part in ("data", "model")]
    given += [f"--{key}={value}" for key, value in pairs(overrides) if key.partition(".")[0] in ("data", "model")]
    try:
        return parser, parser.parse_args(given)
    except ArgumentError as error:
        raise CommandError(plain(str(error))) from error


def build(parser: ArgumentParser, parsed: Namespace) -> tuple[pl.LightningDataModule, Task]:
    """What :func:`parse` gave, built.

    Raises:
        CommandError: it cannot be.
    """
    from jsonargparse import ArgumentError

    from mmlong.cli.engine import plain

    try:
        built = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        raise CommandError(plain(str(error))) from error
    return built.data, built.model
