"""One measurement in a process of its own: ``python -m mmlong.experiments.scale.job step|compare``; prints one line of JSON.

``step``: seconds of one training step (forward, backward, optimiser) and the most memory that the process has held. ``compare``: the gradient in segments against the one without.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from mmlong.datamodules.known import known_sequences
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.measure.memory import peak_bytes
from mmlong.tasks import AutoregressTask
from mmlong.training.optim import OptimConfig, build_optimizer

SOURCES = {"text": "stdlib", "genome": "chromosome"}
WARM_UP = 256  # tokens of a first step, which sets up threads and kernels


def read(kind: str, tokens: int) -> dict[str, Tensor]:
    """One row of so many tokens of real data: the documents of a known source in its own order, a reset before each."""
    parts: list[bytes] = []
    missing = tokens
    for record in known_sequences(SOURCES[kind]).load(None).records:
        parts.append(record.load()[:missing])
        missing -= len(parts[-1])
        if not missing:
            break
    else:
        raise SystemExit(f"{SOURCES[kind]} holds {tokens - missing:,} tokens, fewer than the {tokens:,} asked for")
    resets = torch.zeros(1, tokens, dtype=torch.bool)
    begin = 0
    for part in parts:
        resets[0, begin] = True
        begin += len(part)
    raw = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)[None]
    return {"raw": raw, "resets": resets, "index": torch.zeros(1, dtype=torch.int64)}


def build(options: argparse.Namespace, segment: int | None) -> AutoregressTask:
    """The model, the same for the same options."""
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=options.dim, depth=options.depth, mixers=[options.mixer])
    keep = options.keep if segment is not None else 1
    return AutoregressTask({"name": options.data}, backbone, segment=segment, keep=keep, samples=0)


def loss_backward(task: AutoregressTask, batch: dict[str, Tensor]) -> float:
    """Bits a token; leaves the gradient."""
    total, numbers = task.nats(batch)
    bits = total / numbers / torch.log(torch.tensor(2.0))
    bits.backward()
    return float(bits.detach())


def step(options: argparse.Namespace) -> dict[str, float]:
    """Time and memory of ``repeats`` training steps; the shortest counts."""
    task = build(options, options.segment)
    optimizer, _ = build_optimizer(task.model, OptimConfig(), 2)
    batch = read(options.data, options.tokens)
    loss_backward(task, {key: value[:, :WARM_UP] if value.ndim == 2 else value for key, value in batch.items()})
    seconds, bits = [], 0.0
    for _ in range(options.repeats):
        optimizer.zero_grad()
        start = time.perf_counter()
        bits = loss_backward(task, batch)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak": peak_bytes(), "bits": bits}


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Distance of the two gradients over the length of the one without segments: of all parameters together, and of the worst single one."""
    batch = read(options.data, options.tokens)
    found = []
    for segment in (None, options.segment):
        task = build(options, segment)
        loss_backward(task, batch)
        found.append([p.grad for p in task.parameters() if p.grad is not None])
    apart = torch.stack([(a - b).norm() for a, b in zip(*found, strict=True)]).double()
    whole = torch.stack([a.norm() for a in found[0]]).double()
    # A parameter whose gradient vanishes (a bias before a norm) is all rounding: it is held against the gradient as a whole.
    single = apart / whole.maximum(1e-3 * whole.norm())
    return {"error": float(apart.norm() / whole.norm()), "worst": float(single.max())}


def keep_option(value: str) -> int | str:
    """``--keep``: a number, or ``sqrt``."""
    return value if value == "sqrt" else int(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both commands take."""
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--mixer", default="mamba2")
    parser.add_argument("--segment", type=int, default=1 << 14, help="tokens in a segment")
    parser.add_argument("--keep", type=keep_option, default=1, help="keep every so many-th state, or sqrt")
    parser.add_argument("--data", choices=sorted(SOURCES), default="text", help="the standard library's bytes, or DNA")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["step", "compare"])
    add_options(parser)
    parser.add_argument("--whole", action="store_true", help="without segments")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.whole:
        options.segment = None
    print(json.dumps((step if options.what == "step" else compare)(options)))


if __name__ == "__main__":
    main()
