"""One training step of a recipe's model, on a synthetic batch of the recipe's shapes: forward, backward, clipping, the optimiser and averaged weights.

The order in a process: the memory held is the baseline; the model and its batch are built; a whole step sets up threads, kernels, optimiser and compiled code; the timed steps; the most memory
held; then, where asked for, one more under the counter, uncompiled. One batch makes a step, whatever the recipe accumulates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from mmlong.bench.contest import Conditions, Say
from mmlong.bench.layers import Gauge, autocast, counted, timed
from mmlong.bench.process import Job, RunJob, run_job
from mmlong.bench.rows import Row, gather
from mmlong.estimate.step import TrainingStep, synthetic_batch
from mmlong.tasks import Task

DEFAULT_DIM = 256
DEFAULT_LENGTH = 16384


def default_model(dim: int = DEFAULT_DIM, length: int = DEFAULT_LENGTH) -> Job:
    """The default backbone reading bytes, one row: what :func:`run_models` takes."""
    settings = {"modality": {"name": "text"}, "backbone": {"dim": dim}, "samples": 0}
    return {
        "name": f"default backbone, dim {dim}",
        "task": {"class_path": "mmlong.tasks.AutoregressTask", "init_args": settings},
        "trainer": {},
        "shape": {"batch": 1, "length": length, "streamed": True},
    }


def build(settings: dict[str, Any]) -> Task:
    """A task from ``class_path`` and ``init_args``, the weights the same each time."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "model", required=True)
    torch.manual_seed(0)
    return parser.instantiate_classes(parser.parse_object({"model": settings})).model


def measure(job: Job) -> dict[str, Any]:
    """Times, memory, counted work and tokens of a step.

    Args:
        job: ``task`` (see :func:`build`), ``trainer`` (the recipe's options), ``shape`` (``batch``, ``length``, ``streamed``), ``dtype``, ``repeats``, ``count``, ``device``.
    """
    device, shape = job["device"], job["shape"]
    gauge = Gauge(device)
    task = build(job["task"]).to(device)
    batch = synthetic_batch(task, shape["batch"], shape["length"], shape["streamed"])
    if not task.model.modality.initialised:
        task.model.modality.initialise(batch["raw"])
    batch = {key: value.to(device) for key, value in batch.items()}
    # The format is the job's, by autocast as `bf16-mixed` has it.
    step = TrainingStep(task, {**job["trainer"], "precision": None, "accumulate_grad_batches": 1})
    blocks = task.model.backbone.blocks() if task.compile_blocks else []
    for block in blocks:
        block.compile()

    def forget() -> None:
        step.optimizer.zero_grad(set_to_none=True)

    def forward() -> Tensor:
        with autocast(job):
            return step.forward(batch)

    def backward(loss: Tensor) -> None:
        loss.backward()
        step.update()

    timed(forget, forward, backward, device)
    times = [timed(forget, forward, backward, device) for _ in range(job["repeats"])]
    found = {"times": times, **gauge.read(), "tokens": task.tokens_in(batch), "flops": None}
    if job["count"]:
        for block in blocks:
            block._compiled_call_impl = None
        forget()
        found["flops"] = counted(forward, backward)
    return found


def run_models(
    models: Sequence[Job], conditions: Conditions, run: RunJob = run_job, say: Say = lambda _: None
) -> list[Row]:
    """Measure a step of each model in each number format, formats in turn, each time in a process of its own.

    Args:
        models: each ``name``, ``task``, ``trainer`` and ``shape``, see :func:`measure`.
        conditions: of which ``dtypes``, ``rounds``, ``repeats`` and where to run are read.
        run: runs a job.
        say: is told of each process.
    """
    rows = []
    for model in models:
        results: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in conditions.dtypes}
        for number in range(conditions.rounds):
            for dtype, found in results.items():
                if any("failed" in r for r in found):
                    continue
                job = {"kind": "model", **conditions.where(), **model, "dtype": dtype}
                found.append(run({**job, "repeats": conditions.repeats, "count": number == 0}))
                failed = found[-1].get("failed")
                told = f"{min(t['all'] for t in found[-1]['times']):.3g} s" if failed is None else failed.split("\n")[0]
                say(f"{model['name']}, {dtype}, process {number + 1}: {told}")
        shape = model["shape"]
        dim = model["task"]["init_args"]["backbone"].get("dim")
        for dtype, found in results.items():
            tokens = next((r["tokens"] for r in found if "tokens" in r), None)
            length = shape["length"] or 0 if tokens is None else -(-tokens // shape["batch"])
            row = Row(
                kind="model", name=model["name"], side="ours", against=None, settings=model,
                dim=dim if isinstance(dim, int) else max(dim or [0]), batch=shape["batch"], length=length, dtype=dtype, mode="step",
            )  # fmt: skip
            rows.append(gather(row, found))
    return rows
