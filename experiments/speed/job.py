"""One side of a contest in a process of its own: ``python -m mmlong.experiments.speed.job NAME SIDE``; prints one line of JSON.

``SIDE`` is ``ours``, ``theirs``, or ``check``, which runs both on a short input and compares outputs and input gradients.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import torch
from mmlong.experiments.speed.contests import CONTESTS, Run
from torch import Tensor


def peak_bytes() -> int:
    """Most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def forward_backward(run: Run, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Seconds of the forward and of both, and seconds of processor time of both (of all threads, waiting for each other included)."""
    x.grad = None
    cpu, start = time.process_time(), time.perf_counter()
    y = run(x)
    between = time.perf_counter()
    y.backward(dy)
    return {
        "forward": between - start,
        "both": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
    }


def data(batch: int, length: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, dim, generator=generator).requires_grad_()
    return x, torch.randn(batch, length, dim, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(CONTESTS))
    parser.add_argument("side", choices=["ours", "theirs", "check"])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pair = CONTESTS[options.name].build(options.dim)
    if options.side == "check":
        x, dy = data(2, 1500, options.dim)
        y = [run(x) for run in (pair.run_ours, pair.run_theirs)]
        dx = [torch.autograd.grad(t, x, dy)[0] for t in y]
        worst = max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in (y, dx))
        print(json.dumps({"difference": worst}))
        return
    run = pair.run_ours if options.side == "ours" else pair.run_theirs
    x, dy = data(1, 256, options.dim)
    forward_backward(run, x, dy)  # first calls set up threads and kernels
    x, dy = data(options.batch, options.length, options.dim)
    before = peak_bytes()
    times = [forward_backward(run, x, dy) for _ in range(options.repeats)]
    print(json.dumps({"times": times, "peak": peak_bytes(), "before": before}))


if __name__ == "__main__":
    main()
