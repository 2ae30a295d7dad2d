"""One token at a time: microseconds a token as the past grows, and what that time is spent on.

A byte model with random weights is given drawn tokens one by one, as generation does but for the draw itself: ``peek`` (the distribution of the next token) and ``put``. The mean of every window of
tokens is kept, so that growth shows. Then, of a token after all of them:

- ``operators`` and ``operator_microseconds``: how many torch operators a token dispatches, and their own time by torch's profiler, of ``profiled_microseconds`` in all. The profiler slows what
  it times; the share outside of operators, ``outside_share``, is Python for the most part, and an estimate.
- ``batch_microseconds``: of a step of ``BATCH`` rows. What does not grow with the rows, ``fixed_share``, is dispatch and the reading of weights, not arithmetic.
- ``weight_bytes``: read for each token, whatever is done with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlong.bench.contest import Conditions, Say
from mmlong.bench.process import Job, RunJob, run_job
from mmlong.mixers import state_bytes
from mmlong.models import AutoregressiveModel, build_model

BATCH = 64
WARM_UP = 8
"""Tokens of another row that come first: threads, kernels, compilation."""
PROFILED = 32
BATCHED = 64
"""Steps of ``BATCH`` rows."""

Step = Callable[[Any, Tensor], tuple[Tensor, Any]]


def build(job: Job) -> AutoregressiveModel:
    """The model, its weights the same each time."""
    torch.manual_seed(0)
    model = build_model(
        {
            "kind": "autoregressive", "modality": {"name": "text"}, "head": {},
            "backbone": {"dim": job["dim"], "depth": job["depth"], "mixers": [{"name": job["mixer"], **job["options"]}]},
        }
    )  # fmt: skip
    assert isinstance(model, AutoregressiveModel)
    return model.to(job["device"]).eval()


def measure(job: Job) -> dict[str, Any]:
    """See above.

    Args:
        job: ``mixer``, ``options``, ``dim``, ``depth``, ``tokens``, ``window`` (tokens, at most ``tokens``), ``compile`` (the step, by torch.compile), ``device``.
    """
    model, device = build(job), job["device"]
    draw = torch.Generator().manual_seed(1)

    def eager(state: Any, token: Tensor) -> tuple[Tensor, Any]:
        prediction, state = model.peek(state)
        return prediction, model.put(state, token)

    step: Step = eager
    if job["compile"]:
        step = torch.compile(eager)
    with torch.inference_mode():
        begun = time.perf_counter()
        _run(step, model.begin(1), _tokens(draw, 1, WARM_UP, device))
        ready = time.perf_counter() - begun
        state, prediction, windows = model.begin(1), torch.empty(0), []
        for start in range(0, job["tokens"], job["window"]):
            here = _tokens(draw, 1, min(job["window"], job["tokens"] - start), device)
            seconds, prediction, state = _run(step, state, here)
            windows.append(1e6 * seconds / len(here))
        found = {
            "microseconds": windows,
            "begin_seconds": ready,
            "state_bytes": state_bytes(state["backbone"]),
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "prediction": prediction.flatten().tolist(),
        }
        return {
            **found,
            **_profile(step, state, _tokens(draw, 1, PROFILED, device)),
            **_batched(step, model, draw, device),
        }


def _tokens(draw: torch.Generator, batch: int, count: int, device: str) -> list[Tensor]:
    return [torch.randint(256, (batch, 1), generator=draw).to(device) for _ in range(count)]


def _run(step: Step, state: Any, tokens: Sequence[Tensor]) -> tuple[float, Tensor, Any]:
    """Seconds of all tokens, the last prediction, and the state after them."""
    prediction = torch.empty(0)
    begun = time.perf_counter()
    for token in tokens:
        prediction, state = step(state, token)
    if prediction.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, prediction.clone(), state


def _profile(step: Step, state: Any, tokens: Sequence[Tensor]) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds, _, _ = _run(step, state, tokens)
    events = profile.key_averages()
    return {
        "profiled_microseconds": 1e6 * seconds / len(tokens),
        "operators": sum(e.count for e in events) / len(tokens),
        "operator_microseconds": sum(e.self_cpu_time_total for e in events) / len(tokens),
    }


def _batched(step: Step, model: AutoregressiveModel, draw: torch.Generator, device: str) -> dict[str, float]:
    """``BATCH`` rows and one, both early in their documents so that their pasts are as long."""
    found = {}
    for name, rows in (("single_microseconds", 1), ("batch_microseconds", BATCH)):
        _, _, state = _run(step, model.begin(rows), _tokens(draw, rows, WARM_UP, device))
        seconds, _, _ = _run(step, state, _tokens(draw, rows, BATCHED, device))
        found[name] = 1e6 * seconds / BATCHED
    return found


def shares(found: dict[str, Any]) -> dict[str, float]:
    """``outside_share`` and ``fixed_share`` of a token's time, 0 to 1; see the module's docstring."""
    one, many = found["single_microseconds"], found["batch_microseconds"]
    row = (many - one) / (BATCH - 1)
    return {
        "outside_share": min(max(1 - found["operator_microseconds"] / found["profiled_microseconds"], 0.0), 1.0),
        "fixed_share": min(max(1 - row / one, 0.0), 1.0),
    }


def run_streams(
    models: Sequence[Job],
    conditions: Conditions,
    compile: bool = False,
    run: RunJob = run_job,
    say: Say = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure each model, each time in a process of its own.

    Args:
        models: each ``name``, and what :func:`measure` takes but ``compile`` and ``device``.
        conditions: of which only where to run is read.
        compile: measure the compiled step as well, after the other; ``difference`` is of the two predictions after the last token, over the largest value.
        run: runs a job.
        say: is told of each process.

    Returns:
        what was found, with the settings and :func:`shares`; ``failed`` where nothing was.
    """
    results: list[dict[str, Any]] = []
    for model in models:
        eager: list[float] | None = None
        for compiled in (False, True) if compile else (False,):
            name = model["name"] + (", compiled" if compiled else "")
            job = {"kind": "stream", **conditions.where(), **model, "compile": compiled}
            found = run(job)
            row = {**model, "name": name, "compiled": compiled}
            if "failed" in found:
                say(f"{name}: {found['failed'].splitlines()[0]}")
                results.append({**row, "failed": found["failed"]})
                continue
            prediction = found.pop("prediction")
            if eager is not None:
                most = max(map(abs, eager))
                row["difference"] = max(abs(a - b) for a, b in zip(eager, prediction, strict=True)) / most
            eager = prediction if not compiled else eager
            say(
                f"{name}: {found['microseconds'][0]:,.0f} us a token at first, {found['microseconds'][-1]:,.0f} at last"
            )
            results.append({**row, **found, **shares(found)})
    return results
