"""The estimate of a recipe's training step: what every rank holds, does and sends.

Memory is what tensors hold. Between steps: parameters and buffers, the optimiser's state, averaged weights. In a step, beside the batch: what is kept for the backward, gradients, states between segments, and
what operators hold on the way; their sum has its peak at one moment, which is counted and not added up. A process holds more: the interpreter and its libraries, and pieces of freed memory that the
C library does not give back at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.backbone.replay import RNG
from mmlong.estimate.count import Counts, MakeBatch, counts_at, grows, total_flops
from mmlong.estimate.hollow import Hollow
from mmlong.estimate.meter import state_of, tensor_bytes
from mmlong.estimate.step import TrainingStep
from mmlong.estimate.traffic import STRATEGIES, Strategy, bubble, traffic
from mmlong.mixers import Mixer, require_streaming
from mmlong.models import Model
from mmlong.registry import nearest
from mmlong.tasks import AutoregressTask


@dataclass(frozen=True)
class Shape:
    """How large a step is, over all ranks of one sequence.

    Attributes:
        batch: rows of a rank (of a group of ranks that share rows, under ``sequence_parallel``).
        length: of a row, in the modality's raw numbers; ``None`` where the modality fixes it.
        ranks: R.
        strategy: how R ranks share the work; ``None`` for one rank.
    """

    batch: int
    length: int | None
    ranks: int = 1
    strategy: str | None = None


@dataclass
class Estimate:
    """What a rank holds, does and sends in one optimiser step; bytes and FLOPs of one rank, the busiest.

    Attributes:
        parameters: how many numbers the model has, and how many are trained.
        strategy: how ranks share the work; ``None`` for one.
        tokens: of all ranks in a step.
        counts: see :data:`mmlong.estimate.count.Counts`.
        recomputed: floating-point operations of forwards that segments do again, in ``counts``.
        memory: bytes by what they are, ``peak`` the most at one moment.
        sent: bytes by what they are.
        bubble: share of the time for which the rank waits for others.
        notes: what to know beside the numbers.
    """

    parameters: tuple[int, int]
    strategy: Strategy | None
    tokens: int
    counts: Counts
    recomputed: float
    memory: dict[str, float]
    sent: dict[str, int]
    bubble: float
    notes: list[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Floating-point operations of the step."""
        return total_flops(self.counts)


def check_strategy(strategy: str | None, ranks: int, step: TrainingStep, segmented: bool) -> Strategy | None:
    """The strategy, if it makes sense.

    Raises:
        ValueError: it is unknown, the ranks make no sense with it, or the model cannot be trained so.
    """
    if ranks < 1:
        raise ValueError(f"--ranks {ranks}: there is at least one")
    if ranks == 1:
        if strategy not in (None, *STRATEGIES):
            raise ValueError(
                f"--strategy {strategy!r}{nearest(str(strategy), STRATEGIES)}; known are {', '.join(STRATEGIES)}"
            )
        return None
    if strategy is None:
        strategy = "sequence_parallel" if step.model.streaming and isinstance(step.task, AutoregressTask) else "ddp"
    if strategy not in STRATEGIES:
        raise ValueError(f"--strategy {strategy!r}{nearest(strategy, STRATEGIES)}; known are {', '.join(STRATEGIES)}")
    if strategy == "sequence_parallel":
        require_streaming(step.model, "sequence parallelism")
        if not isinstance(step.task, AutoregressTask):
            raise ValueError(
                f"sequence parallelism trains AutoregressTask, and this recipe's task is {type(step.task).__name__}: take --strategy ddp or fsdp"
            )
    if strategy == "fsdp" and segmented:
        raise ValueError(
            "training in segments cannot train parameters that FSDP has sharded: it gathers them in hooks and not in the graph. Take --strategy ddp or sequence_parallel, or --model.segment null"
        )
    return strategy  # type: ignore[return-value]


def estimate(step: TrainingStep, make: MakeBatch, shape: Shape) -> Estimate:
    """Estimate one step.

    Args:
        step: of the recipe; settled here, its weights hollow.
        make: ``(rows, length)`` to a batch.
        shape: how large.

    Raises:
        ValueError: the strategy makes no sense with the ranks or the model, or there are more ranks than tokens.
    """
    model, task, length = step.model, step.task, shape.length
    whole, each = model.modality.tokens_per_sample(), model.modality.tokens_per_step
    if whole is None:
        if length is None:
            raise ValueError("the recipe's rows have no length of their own: give --length")
        whole = each * length
    segment = getattr(task, "segment", None)
    strategy = check_strategy(shape.strategy, shape.ranks, step, segment is not None and segment < whole)
    piece = whole
    if strategy == "sequence_parallel":
        piece = -(-whole // shape.ranks)
        if (last := -(-whole // piece)) < shape.ranks:
            raise ValueError(
                f"{shape.ranks} ranks for rows of {whole:,} tokens: in pieces of {piece:,} they make work for {last:,}; take fewer ranks or longer rows"
            )
    if segment is not None and segment >= piece:
        segment = None
    keep: Any = 1
    if segment is not None and isinstance(task, AutoregressTask):
        # Followed with every state kept, whose memory is carried on exactly; what is kept instead is put in below.
        keep, task.keep = task.keep, 1
    known: dict[int, Counts] = {}
    # Rows go one after another through the ranks of a sequence.
    rows = 1 if strategy == "sequence_parallel" else shape.batch

    def at(tokens: int | None) -> Counts:
        return counts_at(step, make, rows, None if tokens is None else -(-tokens // each), segment, known)

    with Hollow(step.weights):
        step.settle(make(rows, None if length is None else min(length, 64)))
        counts = dict(at(None if length is None else piece))
        if piece < whole and grows(model):
            counts = _last_piece(counts, at(whole), at(whole - piece))
    counts = {key: value if key in ("kept", "peak") else value * (shape.batch / rows) for key, value in counts.items()}
    recomputed = 0.0
    offset = whole - piece
    between = 0
    if segment is not None:
        n = math.ceil(piece / segment)
        every = math.ceil(math.sqrt(n)) if keep == "sqrt" else int(keep)
        again = (n - math.ceil(n / every)) / n
        recomputed = counts["forward"] * (1 + again)
        counts = _again(counts, again)
        held = _held(n, every)
        between = _states(model, shape.batch, offset, segment, held)
        # The random generator's states are no work of operators, so they were not followed.
        generators = RNG(torch.device("cpu")).cpu.nbytes * len(held) * (shape.batch // rows)
        counts["peak"] += between - _states(model, rows, 0, segment, _held(n, 1)) + generators
        between += generators
    trained = step.trained
    sizes = {
        "parameters and buffers": tensor_bytes(_tensors(model)),
        "gradients": tensor_bytes(trained),
        "optimiser state": tensor_bytes(state_of(step.optimizer)),
        "averaged weights": 0 if step.averaged is None else tensor_bytes(_tensors(step.averaged)),
    }  # fmt: skip
    states = shape.batch * _state_bytes(_mixers(model), offset) if piece < whole else 0
    ranks = shape.ranks
    memory: dict[str, float] = dict(sizes)
    peak = counts["peak"] + counts["batch"]
    if strategy == "fsdp":
        unit = max(tensor_bytes(list(block.parameters())) for block in model.backbone.blocks())
        memory = {key: size / ranks for key, size in sizes.items()}
        memory["one block's parameters and gradients, gathered"] = 2 * unit
        peak += 2 * unit - (sizes["gradients"] - memory["gradients"])
    elif strategy is not None:
        memory["gradients, in buckets"] = sizes["gradients"]
        peak += sizes["gradients"]
    peak += sum(size for key, size in memory.items() if key in sizes and key != "gradients")
    memory |= {
        "batch": counts["batch"],
        "kept for the backward": counts["kept"] if segment is None else 0,
        "states between segments": between if segment is not None else 0,
    }
    memory["on the way"] = max(peak - sum(memory.values()), 0)
    memory["peak"] = peak
    whole_rows = shape.batch * (1 if strategy in (None, "sequence_parallel") else ranks)
    sent = (
        traffic(strategy, ranks, tensor_bytes(list(model.parameters())), sizes["gradients"], states, step.accumulate)
        if strategy
        else {}
    )
    return Estimate(
        parameters=(sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)),
        strategy=strategy,
        tokens=whole_rows * whole * step.accumulate,
        counts=counts,
        recomputed=recomputed,
        memory=memory,
        sent=sent,
        bubble=bubble(strategy, ranks, shape.batch) if strategy else 0.0,
        notes=_notes(step, strategy, shape),
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _last_piece(piece: Counts, whole: Counts, before: Counts) -> Counts:
    """The counts of the last rank, which has every other's tokens behind it: work is what the whole has over all but it, memory is that of its own length."""
    held = ("kept", "peak", "batch")
    return {key: piece.get(key, 0) if key in held else max(whole[key] - before.get(key, 0), 0) for key in whole}


def _again(counts: Counts, share: float) -> Counts:
    """With a share of the forward done once more."""
    forward = counts["forward"] / max(total_flops(counts), 1)
    held = ("kept", "peak", "batch", "forward")
    return {key: value if key in held else value * (1 + share * forward) for key, value in counts.items()}


def _mixers(model: Model) -> list[Mixer]:
    return [m for m in model.modules() if isinstance(m, Mixer)]


def _state_bytes(mixers: list[Mixer], length: int) -> int:
    """Bytes of a row's state after ``length`` tokens, by the mixers' own declaration; 0 before the first."""
    return sum(mixer.state_bytes(length) for mixer in mixers) if length else 0


def _held(count: int, keep: int) -> list[int]:
    """Of ``count`` segments those whose states before them are held at once: every ``keep``-th, and those after the last of these, computed again."""
    last = (count - 1) // keep * keep
    return [*range(0, last, keep), *range(last, count)]


def _states(model: Model, rows: int, offset: int, segment: int, held: list[int]) -> int:
    """Bytes of the states before segments, of a rank with ``offset`` tokens before it."""
    mixers = _mixers(model)
    constant = None if grows(model) else _state_bytes(mixers, segment)
    return rows * sum(
        constant if constant is not None and offset + k else _state_bytes(mixers, offset + k * segment) for k in held
    )


def _notes(step: TrainingStep, strategy: Strategy | None, shape: Shape) -> list[str]:
    # What parts suppose where the work depends on values.
    notes = sorted({str(m.counted_as) for m in step.model.modules() if hasattr(m, "counted_as")})
    if step.task.compile_blocks:
        notes.append("counted as it runs without torch.compile, which holds and moves less")
    if strategy == "sequence_parallel" and shape.batch < shape.ranks:
        notes.append(
            f"{shape.batch} rows keep {shape.ranks} ranks busy for little of the time; more rows (--batch) share it better"
        )
    if getattr(step.model.backbone.config, "checkpoint", False) or getattr(
        step.model.backbone.config, "reversible", False
    ):
        notes.append("what checkpointed or reversible blocks compute again is in the backward's share")
    return notes
