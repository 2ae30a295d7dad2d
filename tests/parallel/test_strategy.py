"""``strategy: sequence_parallel`` as Lightning and the command line see it: two ranks of one sequence are one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.records import Record, SequenceSource
from safetensors.torch import load_file

from mmlong.backbone import BackboneConfig
from mmlong.cli import main
from mmlong.parallel.strategy import SequenceParallelStrategy, check_task
from mmlong.tasks import AutoregressTask, ClassifyTask
from mmlong.training.metrics_csv import column, read_metrics

RECIPE = """\
seed_everything: 3
best_by: val/bits
data:
  class_path: mmlong.datamodules.text.TextDataModule
  init_args: {{dataset: {data}, windows: stream, length: 37, eval_length: 53, batch_size: 3, eval_batch_size: 2}}
model:
  class_path: mmlong.tasks.AutoregressTask
  init_args:
    modality: {{name: text}}
    backbone: {{dim: 8, depth: 2, mixers: [mamba2, {{name: local, window: 6}}]}}
    optim: {{lr: 0.01, warmup: 1, ema: 0.5}}
    segment: 8
    samples: 0
trainer:
  accelerator: cpu
  precision: 64-true
  max_steps: 3
  accumulate_grad_batches: 2
  gradient_clip_val: 1.0
  val_check_interval: 2
  check_val_every_n_epoch: null
  log_every_n_steps: 1
"""


def _text(seed: int) -> bytes:
    draw = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(97, 123, (150 + 40 * seed,), generator=draw).tolist())


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMLONG_RUN_DIR", raising=False)
    splits = ["train"] * 6 + ["val", "test"]
    records = [Record(f"{i}.txt", partial(_text, i), split=split) for i, split in enumerate(splits)]
    source = SequenceSource("letters", "text", "txt", {}, "made up", "none needed", records)
    pack_sequences(source, tmp_path / "packed", splits={})
    Path("letters.yaml").write_text(RECIPE.format(data=tmp_path / "packed"))
    return "letters.yaml"


def fit(recipe: str, folder: str, *more: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Path]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mmlong", "fit", "-c", recipe, f"--run_dir={folder}", *more],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = Path(folder)
    return json.loads((run / "summary.json").read_text()), load_file(run / "model.safetensors"), run


LAYERS = '{"class_path": "mmlong.parallel.strategy.SequenceParallelStrategy", "init_args": {"layers": true}}'


@pytest.mark.slow
@pytest.mark.parametrize("more", [["sequence_parallel"], [LAYERS, "--model.segment=null"]], ids=["rows", "layers"])
def test_two_ranks_of_the_command_are_one_process(recipe: str, more: list[str]) -> None:
    """With accumulation, clipping and averaged weights; losses, evaluation, weights, and what is counted."""
    alone, weights, run = fit(recipe, "alone")
    shared, same, both = fit(recipe, "shared", "--trainer.devices=2", "--trainer.strategy", *more)
    assert (alone["ranks"], shared["ranks"]) == (1, 2)
    assert shared["test/bits"] == pytest.approx(alone["test/bits"], rel=1e-6)
    there, here = read_metrics(run / "metrics.csv"), read_metrics(both / "metrics.csv")
    for name in ("train/bits", "train/loss", "val/bits"):
        steps, values = column(there, name)
        assert len(steps) >= 2
        found = column(here, name)
        assert found[0] == steps
        assert found[1] == pytest.approx(values, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-6, atol=1e-9)
    # Tokens were counted once, though two ranks held them.
    meters = [
        torch.load(folder / "checkpoints" / "step=3.ckpt", weights_only=True)["callbacks"]["Meter"]["tokens"]
        for folder in (run, both)
    ]
    assert meters[0] == meters[1] > 0


def test_the_command_refuses_what_cannot_be(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", recipe, "--sequence_ranks=2"]) != 0
    assert "ranks share sequences with trainer.strategy: sequence_parallel" in capfd.readouterr().err
    os.environ.pop("MMLONG_RUN_DIR", None)
    assert main(["fit", "-c", recipe, "--trainer.strategy=sequence_parallel", "--sequence_ranks=2"]) != 0
    assert "1 ranks cannot be shared out in groups of sequence_ranks = 2" in capfd.readouterr().err
    os.environ.pop("MMLONG_RUN_DIR", None)


def test_tasks_that_look_at_a_whole_sequence_are_refused() -> None:
    def backbone(direction: Any) -> BackboneConfig:
        return BackboneConfig(dim=8, depth=1, mixers=["s4d"], direction=direction)

    modality = {"name": "text"}
    info = {"num_classes": 2}
    with pytest.raises(ValueError, match="strategy: sequence_parallel needs a streaming model.*both sides"):
        check_task(ClassifyTask(modality, backbone("both"), data_info=info))
    with pytest.raises(ValueError, match="ClassifyTask looks at a sequence as a whole"):
        check_task(ClassifyTask(modality, backbone("causal"), data_info=info))
    with pytest.raises(ValueError, match=r"goes on from the batch before: set one of them"):
        check_task(AutoregressTask(modality, backbone("causal"), carry=True))
    check_task(AutoregressTask(modality, backbone("causal")))


def test_layers_need_the_pieces_graph() -> None:
    task = AutoregressTask({"name": "text"}, BackboneConfig(dim=8, depth=1, mixers=["s4d"]), segment=4)
    strategy = SequenceParallelStrategy(1, layers=True)
    with pytest.raises(ValueError, match=r"model.segment is 4: set one of them"):
        strategy.connect(task)
    task.segment, task.compile_blocks = None, True
    with pytest.raises(ValueError, match=r"which model.compile cannot take"):
        strategy.connect(task)


@pytest.mark.parametrize(("ranks", "places"), [(1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (None, [0, 0, 0, 0])])
def test_ranks_of_a_sequence_get_one_batch(ranks: int | None, places: list[int]) -> None:
    found = []
    for rank in range(4):
        strategy = SequenceParallelStrategy(ranks)
        trainer = pl.Trainer(accelerator="cpu", devices=4, strategy=strategy, logger=False, enable_checkpointing=False)
        assert trainer.strategy is strategy
        strategy.cluster_environment.set_global_rank(rank)  # type: ignore[union-attr]
        strategy.cluster_environment.set_world_size(4)  # type: ignore[union-attr]
        place = trainer.distributed_sampler_kwargs
        assert place is not None
        assert place["num_replicas"] == max(places) + 1
        found.append(place["rank"])
    assert found == places


def test_the_strategy_has_a_name() -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="sequence_parallel", logger=False, enable_checkpointing=False
    )
    assert isinstance(trainer.strategy, SequenceParallelStrategy)
    assert trainer.strategy.sequence_ranks == 2
    with pytest.raises(ValueError, match="sequence_ranks 0"):
        SequenceParallelStrategy(0)
