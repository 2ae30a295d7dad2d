"""The engine behind ``mmlong fit`` and its sisters: LightningCLI builds the parts, this runs them and says what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mmlong.cli.errors import CommandError
from mmlong.cli.predictions import PredictionWriter
from mmlong.cli.runs import BEST, STORY, Resumed, command_line, new_run, resolve_checkpoint, tell_story
from mmlong.datamodules.errors import DataError
from mmlong.measure import machine
from mmlong.measure.checkout import commit
from mmlong.measure.machine import describe as describe_machine
from mmlong.models import save_model
from mmlong.results import write_json
from mmlong.runs import CHECKPOINTS, CONFIG
from mmlong.tasks import ArchitectureMismatchError, Task
from mmlong.training.adapters import ADAPTER, save_adapter
from mmlong.training.checkpoints import AtomicCheckpointIO, CheckpointWriteError, newest_whole, read_checkpoint, step_of
from mmlong.training.finite import NonFiniteError, StopOnNaN
from mmlong.training.meter import Meter, peak_memory
from mmlong.training.metrics_csv import METRICS, MetricsCSV, read_metrics
from mmlong.training.pictures import draw_curves
from mmlong.training.progress import RunProgress, describe, duration
from mmlong.training.resume import ResumeCheckpoint, RunStoppedError
from mmlong.training.rng import RNGStateCallback
from mmlong.training.transfer import BACKBONE, save_backbone

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # steps decide
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # the datamodules divide samples among ranks themselves
}
TRACEBACK = "MMLONG_TRACEBACK"
LESS_IS_BETTER = ("loss", "bits", "error", "mse", "mae")
TOLD = (DataError, ArchitectureMismatchError, CheckpointWriteError)
"""Errors that say all there is to say."""


def describe_data(data: Any) -> dict[str, Any]:
    """What a datamodule fixes for the model: ``modality`` options, ``num_classes`` and ``class_names``."""
    return dict(data.info()) if hasattr(data, "info") else {"modality": {}}


def data_told(data: Any) -> dict[str, Any]:
    """What a datamodule says of where its data come from, for the run's summary; an own one may say nothing."""
    told = {"name": "dataset_name", "source": "source", "licence": "licence", "classes": "class_names"}
    found = {key: getattr(data, name, None) for key, name in told.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if value}


class _CLI(LightningCLI):
    """LightningCLI without sub-commands: the engine calls the trainer, and a checkpoint's hyper-parameters never touch the
    command line's."""

    def __init__(self, arguments: list[str], engine: Engine) -> None:
        self.engine = engine
        super().__init__(
            model_class=Task, datamodule_class=pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            save_config_callback=None, trainer_defaults=TRAINER_DEFAULTS, seed_everything_default=0,
            parser_kwargs={"exit_on_error": False}, args=arguments, run=False, auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )  # fmt: skip

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys of a run, and what the data fixes for the model."""
        parser.add_argument("--recipe", type=str, default="run")
        parser.add_argument("--runs", type=str, default="runs")
        parser.add_argument("--run_dir", type=str | None, default=None)
        parser.add_argument("--ckpt_path", type=str | None, default=None)
        parser.add_argument("--test_after_fit", type=Literal["best", "last"] | None, default="last")
        parser.add_argument("--best_by", type=str, default="val/accuracy")
        parser.add_argument("--checkpoint_seconds", type=float, default=60.0)
        parser.add_argument("--sequence_ranks", type=int | None, default=None)
        parser.add_argument("--rescale", type=float | Literal["whole", "partly"], default="whole")
        parser.link_arguments("data", "model.init_args.data_info", compute_fn=describe_data, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without the warning about ``sys.argv``."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Fix the run folder, so that the parts know it."""
        self.engine.prepare(self.config)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer of the recipe with the engine's callbacks, logger and checkpoint writer."""
        given = dict(self._get(self.config_init, "trainer", default={}))
        given.update(kwargs)
        return self.trainer_class(**self.engine.trainer_arguments(given))


class Engine:
    """One call of a training command.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: the merged recipes.
        overrides: arguments of the command line, which win over the recipes.
        shown: the whole command, to be kept in the summary.
        recipes: what was merged, each recipe's content by its name, to be kept beside the configuration.
    """

    def __init__(
        self, command: str, config: dict[str, Any], overrides: list[str], shown: list[str], recipes: dict[str, Any]
    ) -> None:
        self.command = command
        self.arguments = [f"--config={json.dumps(config)}", *overrides]
        self.overrides = overrides
        self.recipes = recipes
        self.shown = shown
        self.begun = time.time()
        self.meter = Meter()
        self.resumed: Resumed | None = None
        self.run_dir = Path()
        self.settings = Namespace()
        self.progress: RunProgress | None = None
        self.best: ModelCheckpoint | None = None

    # building

    def prepare(self, config: Namespace) -> None:
        """Choose checkpoint and run folder."""
        self.settings = config
        root = Path(config.runs)
        if config.ckpt_path is not None:
            self.resumed = resolve_checkpoint(config.ckpt_path, config.recipe, root)
        if self.command == "fit" and config.rescale != "whole":
            raise CommandError(
                "--rescale is for models that are trained: with validate, test or predict. To train at another rate: --data.rate"
            )
        if self.resumed is not None and self.resumed.run is not None and config.run_dir is None:
            self.run_dir = self.resumed.run
        else:
            self.run_dir = new_run(config.recipe, root, config.run_dir)

    def trainer_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The recipe's trainer arguments and what every run has."""
        given = self._seen(given)
        self.progress = RunProgress(self.meter, self.settings.recipe)
        callbacks: list[pl.Callback] = [*_listed(given.get("callbacks")), self.meter, self.progress]
        loggers = [] if given.get("logger") in (None, True, False) else _listed(given["logger"])
        if self.command == "fit":
            folder = self.run_dir / CHECKPOINTS
            by = self.settings.best_by
            self.best = ModelCheckpoint(
                folder, BEST.removesuffix(".ckpt"), monitor=by, mode="min" if by.endswith(LESS_IS_BETTER) else "max",
                enable_version_counter=False, save_on_train_epoch_end=False,
            )  # fmt: skip
            callbacks += [
                StopOnNaN(), RNGStateCallback(), self.best,
                ResumeCheckpoint(folder, self.settings.checkpoint_seconds),
            ]  # fmt: skip
            if given.get("logger") is not False:
                loggers.insert(0, MetricsCSV(self.run_dir))
        elif self.command == "predict":
            callbacks.append(PredictionWriter(self.run_dir))
        plugins = [*_listed(given.get("plugins")), AtomicCheckpointIO()]
        return {
            **given, "callbacks": callbacks, "logger": loggers or False, "plugins": plugins, "default_root_dir": str(self.run_dir),
            **self._strategy(given.get("strategy")),
        }  # fmt: skip

    def _seen(self, given: dict[str, Any]) -> dict[str, Any]:
        """A short run leaves a curve, and is validated at its end, and not never."""
        steps = given.get("max_steps") or -1
        if self.command != "fit" or steps < 1:
            return given
        if every := given.get("log_every_n_steps"):
            given = {**given, "log_every_n_steps": min(every, max(steps // 10, 1))}
        between = given.get("val_check_interval")
        # In batches; without epochs they are counted through.
        last = steps * int(given.get("accumulate_grad_batches") or 1)
        if given.get("check_val_every_n_epoch") is not None or not isinstance(between, int) or between <= last:
            return given
        self._say(f"val_check_interval {between:,} is beyond the end: validating after step {steps:,}")
        return {**given, "val_check_interval": last}

    def _strategy(self, named: Any) -> dict[str, Any]:
        """Lightning knows other strategies by name; this one has a key of its own beside it."""
        ranks = self.settings.sequence_ranks
        if named == "sequence_parallel":
            from mmlong.parallel.strategy import SequenceParallelStrategy

            return {"strategy": SequenceParallelStrategy(ranks)}
        if ranks is not None:
            raise ValueError(
                f"sequence_ranks is {ranks}, but trainer.strategy is {named!r}: ranks share sequences with trainer.strategy: sequence_parallel"
            )
        return {}

    # running

    def run(self) -> int:
        """Build and run; the exit status.

        Raises:
            CommandError: with what is wrong and what to do.
        """
        try:
            self.cli = _CLI(self.arguments, self)
        except SystemExit as done:  # --print_config
            return int(done.code or 0)
        except ArgumentError as error:
            self._leave_nothing()
            raise CommandError(plain(str(error))) from error
        except (ValueError, TypeError, KeyError, MisconfigurationException) as error:
            self._leave_nothing()
            raise self._known(error) from error
        try:
            return {"fit": self._fit, "validate": self._evaluate, "test": self._evaluate, "predict": self._predict}[
                self.command
            ]()
        except RunStoppedError as stopped:
            self._draw()
            print(f"stopped after step {stopped.step} and saved {stopped.checkpoint}\ngo on with: {self._go_on()}")
            return 128 + stopped.signum
        except SystemExit:  # Lightning's answer to a second Ctrl-C
            print(f"stopped at once\ngo on from the last checkpoint with: {self._go_on()}")
            return 130
        except NonFiniteError as error:
            newest, _ = newest_whole(self.run_dir / CHECKPOINTS)
            self._draw()
            hint = "A smaller --model.optim.lr or --trainer.gradient_clip_val 1.0 often helps"
            if newest is None:
                hint = f"No checkpoint was written yet. {hint}"
            else:
                hint = f"The last good checkpoint is {newest}. {hint}; go on with: {self._go_on()} --model.optim.lr LR"
            raise CommandError(f"{error}.\n{hint}", status=1) from error
        except (*TOLD, ValueError, FileNotFoundError) as error:
            if self.cli.trainer.global_step == 0:
                self._leave_nothing()
            raise self._known(error) from error

    @rank_zero_only
    def _leave_nothing(self) -> None:
        """Take back the folder of a run that failed before its first step: it would be the newest of its name, with nothing in it."""
        if self.resumed is not None or self.run_dir == Path():
            return
        folder = self.run_dir / CHECKPOINTS
        if not folder.is_dir() or any(folder.iterdir()):
            return
        for name in (CONFIG, STORY, METRICS):
            (self.run_dir / name).unlink(missing_ok=True)
        # What has anything else in it stays.
        with contextlib.suppress(OSError):
            folder.rmdir()
            self.run_dir.rmdir()
            for parent in self.run_dir.parents:
                if not parent.is_relative_to(self.settings.runs) or parent == Path():
                    break
                parent.rmdir()

    def _known(self, error: BaseException) -> CommandError:
        """A short message for an error that says what is wrong; ``MMLONG_TRACEBACK=1`` shows where instead."""
        if os.environ.get(TRACEBACK):
            raise error
        at: BaseException | None = error
        while at is not None:
            # jsonargparse wraps what a datamodule says.
            if isinstance(at, TOLD):
                return CommandError(str(at), status=1)
            at = at.__cause__ or at.__context__
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        return CommandError(f"{plain(text)} ({TRACEBACK}=1 shows where)", status=1)

    def _go_on(self) -> str:
        return command_line(["mmlong", "fit", "--ckpt_path", str(self.run_dir)])

    def _fit(self) -> int:
        trainer, task, data = self.cli.trainer, self.cli.model, self.cli.datamodule
        self._save_config()
        self._tell_story(trainer, task, data)
        begun = "" if self.resumed is None else f"; going on from {self.resumed.checkpoint}"
        self._say(f"run folder: {self.run_dir}{begun}")
        if self.resumed is not None and 0 < trainer.max_steps <= step_of(self.resumed.checkpoint):
            self._say(f"this run has done its {trainer.max_steps:,} steps; raise --trainer.max_steps to train on")
        trainer.fit(
            task,
            datamodule=data,
            ckpt_path=None if self.resumed is None else self.resumed.checkpoint,
            weights_only=True,
        )
        which, weights = self._chosen()
        if weights is not None:
            task.load_state_dict(read_checkpoint(weights)["state_dict"])
        tested: Mapping[str, float] = {}
        if self.settings.test_after_fit is not None:
            # An empty list of results: the data has no test split.
            tested = next(iter(trainer.test(task, datamodule=data, verbose=False)), {})
        if trainer.is_global_zero:
            save_model(task.model, self.run_dir)
            save_backbone(task.model.backbone, self.run_dir / BACKBONE)
            if task.optim.lora is not None:
                save_adapter(task.model, self.run_dir / ADAPTER, task.backbone_from)
            self._draw()
            self._summarise(trainer, task, which, tested)
        return 0

    def _chosen(self) -> tuple[str, Path | None]:
        """Which weights the run ends with, and their checkpoint."""
        best = self.run_dir / CHECKPOINTS / BEST
        if self.settings.test_after_fit == "best" and best.is_file():
            return "best", best
        return "last", newest_whole(self.run_dir / CHECKPOINTS)[0]

    def _evaluate(self) -> int:
        assert self.resumed is not None
        trainer, task, data = self.cli.trainer, self.cli.model, self.cli.datamodule
        task.rescale = self.settings.rescale
        measure = trainer.test if self.command == "test" else trainer.validate
        found = measure(task, datamodule=data, ckpt_path=self.resumed.checkpoint, weights_only=True, verbose=False)
        if not found:
            raise CommandError(f"the data has no samples to {self.command} on", status=1)
        prefix = "test/" if self.command == "test" else "val/"
        if trainer.is_global_zero:
            name, told = self.command, {"checkpoint": str(self.resumed.checkpoint), **found[0]}
            if (done := task.resampled) is not None:
                # Beside what the model says at the rate it was trained at, not in place of it.
                name += f"-at-{task.model.config['modality']['rate']}"
                name += "" if isinstance(self.settings.rescale, str) else f"-factor-{done.factor:g}"
                told["resampled"] = dataclasses.asdict(done)
            write_json(self.run_dir / f"{name}.json", told)
        self._say(
            f"{self.settings.recipe}: {describe(found[0], prefix)}\nfrom {self.resumed.checkpoint}; see {self.run_dir}"
        )
        return 0

    def _predict(self) -> int:
        assert self.resumed is not None
        trainer = self.cli.trainer
        self.cli.model.rescale = self.settings.rescale
        trainer.predict(
            self.cli.model, datamodule=self.cli.datamodule, ckpt_path=self.resumed.checkpoint, weights_only=True,
            return_predictions=False,
        )  # fmt: skip
        table = next(c for c in trainer.callbacks if isinstance(c, PredictionWriter)).table  # type: ignore[attr-defined]
        assert table is not None
        self._say(f"{table.rows:,} predictions in {table.path}, from {self.resumed.checkpoint}")
        return 0

    # what is left behind

    @rank_zero_only
    def _save_config(self) -> None:
        kept = self.settings.clone()
        for key in ("config", "run_dir", "ckpt_path", "rescale"):
            kept.pop(key, None)
        text = self.cli.parser.dump(kept, skip_none=False)
        path = self.run_dir / CONFIG
        if path.exists() and path.read_text() != text and self.resumed is not None:
            path = self.run_dir / f"config-from-{self.resumed.checkpoint.stem}.yaml"
        path.write_text(text)

    @rank_zero_only
    def _tell_story(self, trainer: pl.Trainer, task: Task, data: Any) -> None:
        device = trainer.strategy.root_device.type
        named = ("dataset_name", "source", "licence", "label")
        tell_story(
            self.run_dir,
            {
                "command": command_line(self.shown),
                "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.begun)),
                "from": None if self.resumed is None else str(self.resumed.checkpoint),
                "machine": {"device": str(trainer.strategy.root_device), **describe_machine(device, 0)},
            },
            {
                "recipe": self.settings.recipe,
                "recipes": self.recipes,
                "overrides": self.overrides,
                "data": {name: getattr(data, name, None) for name in named},
                "class_names": task.class_names,
                "task": type(task).__name__,
            },
        )

    @rank_zero_only
    def _draw(self) -> None:
        metrics = self.run_dir / "metrics.csv"
        if metrics.is_file():
            draw_curves(read_metrics(metrics), self.run_dir / "loss.png", self.settings.recipe)

    @rank_zero_only
    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _summarise(self, trainer: pl.Trainer, task: Task, which: str, tested: Mapping[str, float]) -> None:
        memory = peak_memory()
        length = task.model.tokens_per_sample()
        summary = {
            "recipe": self.settings.recipe,
            "command": command_line(self.shown),
            "weights": which,
            **{key: round(float(value), 6) for key, value in tested.items()},
            "steps": trainer.global_step,
            "train_seconds": round(self.meter.seconds, 1),
            "train_cpu_seconds": None if self.meter.cpu_seconds is None else round(self.meter.cpu_seconds, 3),
            "command_seconds": round(time.time() - self.begun, 1),
            "tokens": self.meter.tokens,
            "tokens_per_sample": length,
            "tokens_per_second": round(self.meter.average_rate),
            "parameters": task.model.num_parameters(),
            "peak_memory_bytes": memory,
            "device": str(trainer.strategy.root_device),
            "ranks": trainer.world_size,
            "threads": torch.get_num_threads(),
            "skipped_samples": sum(getattr(self.cli.datamodule, "skipped", {}).values()),
            "data": data_told(self.cli.datamodule),
            "machine": machine.hardware(trainer.strategy.root_device.type),
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("mmlong", "torch", "lightning")},
            },
        }
        write_json(self.run_dir / "summary.json", summary)
        lines = []
        if summary["skipped_samples"]:
            lines.append(f"skipped bad samples {summary['skipped_samples']:,} times; the log names them")
        if not tested and self.settings.test_after_fit is not None:
            lines.append("not tested: the data has no test split")
        if tested:
            lines.append(f"{self.settings.recipe}: {describe(tested, 'test/')} ({which} weights)")
        speed = f", {self.meter.average_rate:,.0f} tokens a second" if self.meter.tokens else ""
        lines.append(f"trained {trainer.global_step} steps in {duration(self.meter.seconds)}{speed}; "
                     f"peak memory {memory / 2**30:.2f} GiB")  # fmt: skip
        pictures = [
            name for name in ("loss.png", "confusion.png", "predictions.png") if (self.run_dir / name).is_file()
        ]
        pictures += sorted(path.name for path in self.run_dir.glob("samples*"))
        pictures += [f"{name}/" for name in ("examples", ADAPTER) if (self.run_dir / name).is_dir()]
        lines.append(f"in {self.run_dir}: {', '.join(['summary.json', 'metrics.csv', 'model.safetensors', *pictures])}")
        self._say("\n".join(lines))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def plain(text: str) -> str:
    """What a parser's message comes down to: jsonargparse nests it in the types it tried."""
    text = " ".join(text.split())
    text = re.sub(r"^Call to compute_fn .*? failed: ", "", text)
    inner = text.rpartition(" Errors: - ")[2].partition(" - Expected a <class 'NoneType'>")[0]
    key = "".join(re.findall(r'^Parser key "([^"]+)"', text))
    below = re.findall(r'Parser key "([^"]+)"', text)[1:]
    inner = re.sub(r"^Problem with given class_path '[^']+': ", "", inner)
    inner = re.sub(r'Parser key "[^"]+": ', "", inner)
    inner = re.sub(r"<class '([\w.]+)'>", r"\1", inner)
    inner = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", inner)
    inner = inner.strip('"') if inner.count('"') == 2 else inner
    return f"{'.'.join([key, *below])}: {inner}" if key else inner
