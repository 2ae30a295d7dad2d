"""Counts carried on to other lengths are those counted there, and the formulas of traffic and time."""

from __future__ import annotations

import pytest

from mmlong.backbone import BackboneConfig
from mmlong.estimate import count
from mmlong.estimate.count import Counts, carry_on, count_step, sampled_lengths, terms, total_flops
from mmlong.estimate.devices import DEVICES, Device, find_device, roofline
from mmlong.estimate.hollow import Hollow
from mmlong.estimate.plan import Shape, estimate
from mmlong.estimate.step import TrainingStep, synthetic_batch
from mmlong.estimate.traffic import all_reduce, bubble, share_out, traffic
from mmlong.mixers import Mixer
from mmlong.models import Model
from mmlong.tasks import AutoregressTask, ClassifyTask
from mmlong.training.optim import OptimConfig


def step_of(mixer: str = "mamba2", **options: object) -> TrainingStep:
    backbone = BackboneConfig(dim=16, depth=2, mixers=[mixer])
    task = AutoregressTask({"name": "text"}, backbone, optim=OptimConfig(ema=0.9), **options)  # type: ignore[arg-type]
    return TrainingStep(task, {})


def found(step: TrainingStep, length: int, rows: int = 1, ranks: int = 1, strategy: str | None = None):  # type: ignore[no-untyped-def]
    return estimate(
        step, lambda n, size: synthetic_batch(step.task, n, size, True), Shape(rows, length, ranks, strategy)
    )


def direct(step: TrainingStep, length: int, rows: int = 1) -> Counts:
    batch = synthetic_batch(step.task, rows, length, True)
    with Hollow(step.weights):
        step.settle(batch)
        return count_step(step, batch)


@pytest.mark.parametrize(("mixer", "keep"), [("mamba2", 1), ("attention", 1), ("mamba2", 3), ("s4d", "sqrt")])
def test_segments_are_carried_on(mixer: str, keep: int) -> None:
    """Nine segments and a bit from four, five (and six)."""
    length, segment = 9 * 16 + 5, 16
    carried = found(step_of(mixer, segment=segment, keep=keep), length, rows=3)
    there = direct(step_of(mixer, segment=segment, keep=keep), length, rows=3)
    assert carried.flops == pytest.approx(total_flops(there), rel=1e-9 if keep == 1 else 0.05)
    fixed = sum(carried.memory[k] for k in ("parameters and buffers", "optimiser state", "averaged weights", "batch"))
    assert carried.memory["peak"] - fixed == pytest.approx(there["peak"], rel=0.1)
    assert carried.counts["kernels"] == pytest.approx(there["kernels"], rel=0.02 if keep == 1 else 0.1)


@pytest.mark.parametrize("mixer", ["mamba2", "local"])
def test_memory_of_many_segments_is_that_of_their_states(mixer: str) -> None:
    """Beyond the first few, a segment leaves its tokens and a state, and nothing else."""
    step = step_of(mixer, segment=16)
    few, many = found(step, 10 * 16), found(step, 1000 * 16)
    (mixers,) = {m.state_bytes(16 * 500) for m in step.model.modules() if isinstance(m, Mixer)}
    more = (many.memory["peak"] - few.memory["peak"]) / 990
    assert 2 * mixers < more < 2 * mixers + 7000  # the generator's state is 5,056 bytes
    assert many.memory["peak"] == pytest.approx(
        direct(step_of(mixer, segment=16), 40 * 16)["peak"] + 960 * more, rel=0.1
    )


def test_rows_of_one_sequence_go_one_after_another() -> None:
    one, eight = (found(step_of(segment=16), 40 * 16, rows=n, ranks=2, strategy="sequence_parallel") for n in (1, 8))
    assert eight.flops == pytest.approx(8 * one.flops)
    assert eight.memory["states between segments"] == pytest.approx(8 * one.memory["states between segments"])
    assert eight.memory["on the way"] == pytest.approx(one.memory["on the way"], rel=0.02)


def test_whole_rows_are_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count, "UNIT", 128)
    monkeypatch.setattr(count, "DIRECT", 128)
    # Units this short are no multiple of the mixer's blocks, whence the last per cent.
    carried, there = found(step_of(), 5 * 128 + 77), direct(step_of(), 5 * 128 + 77)
    assert carried.flops == pytest.approx(total_flops(there), rel=0.02)
    assert carried.counts["kept"] == pytest.approx(there["kept"], rel=0.02)


def test_a_segmented_step_does_its_forward_twice() -> None:
    whole, pieces = found(step_of(), 64), found(step_of(segment=16), 64)
    assert whole.recomputed == 0
    assert pieces.recomputed == pieces.counts["forward"]
    assert pieces.flops - pieces.recomputed == pytest.approx(whole.flops, rel=0.15)  # chunks end where segments do
    assert pieces.memory["peak"] < whole.memory["peak"]


def test_terms_follow_the_declared_costs() -> None:
    def model(*mixers: str) -> Model:
        return AutoregressTask({"name": "text"}, BackboneConfig(dim=16, depth=2, mixers=list(mixers))).model

    assert terms(model("mamba2"), False) == ["n"]
    assert terms(model("mamba2", "attention"), False) == ["n", "n^2"]
    assert terms(model("hyena"), False) == ["n", "n log n"]
    assert terms(model("mamba2"), True) == ["n"]
    assert terms(model("attention"), True) == ["n", "n^2"]


def test_sampled_lengths_leave_the_same_remainder() -> None:
    assert sampled_lengths(1000, None, 2) == [1000]
    assert all(x % count.UNIT == 10**9 % count.UNIT for x in sampled_lengths(10**9, None, 3))
    first = count.FIRST_SEGMENTS * 16
    assert sampled_lengths(1000 * 16 + 4, 16, 2) == [first + 4, first + 20]
    assert sampled_lengths(first + 20, 16, 2) == [first + 20]


def test_carrying_on_is_exact_for_its_terms() -> None:
    samples = {n: {"a": 3.0 + 5 * n + 7 * n * n} for n in (10, 20, 30)}
    assert carry_on(samples, ["n", "n^2"], 10**6)["a"] == pytest.approx(3 + 5e6 + 7e12)
    with pytest.raises(ValueError, match="take 3 lengths, got 2"):
        carry_on({1: {}, 2: {}}, ["n", "n^2"], 5)


def test_traffic() -> None:
    assert (all_reduce(100, 4), share_out(100, 4)) == (150, 75)
    assert traffic("ddp", 1, 100, 100) == {}
    assert sum(traffic("ddp", 4, 100, 80).values()) == 120
    assert sum(traffic("fsdp", 4, 100, 100).values()) == 3 * 75
    sent = traffic("sequence_parallel", 4, 100, 80, states=7, accumulate=2)
    assert sent == {"states, forward": 14, "their gradients, back": 14, "gradients, reduced": 120}
    assert bubble("ddp", 4, 1) == 0
    assert bubble("sequence_parallel", 4, 9) == pytest.approx(3 / 12)


def test_sequence_parallel_ranks_hand_on_the_declared_state() -> None:
    step = step_of(segment=16)
    alone, shared = found(step_of(segment=16), 64, rows=2), found(step, 64, rows=2, ranks=4)
    assert shared.strategy == "sequence_parallel"
    state = sum(block.mixer.state_bytes(48) for block in step.model.backbone.blocks())
    assert shared.sent["states, forward"] == shared.sent["their gradients, back"] == 2 * state
    assert shared.flops == pytest.approx(alone.flops / 4 * 3 / 4, rel=0.1)  # a piece is one segment, done once
    assert shared.tokens == alone.tokens == 128


def test_the_last_rank_of_a_growing_state_has_the_others_behind_it() -> None:
    shared, alone = found(step_of("attention", segment=8), 64, ranks=2), found(step_of("attention", segment=8), 64)
    first = found(step_of("attention", segment=8), 32)
    assert shared.flops == pytest.approx(alone.flops - first.flops, rel=1e-6)
    assert shared.memory["states between segments"] > first.memory["states between segments"]


def test_fsdp_parts_what_ddp_repeats() -> None:
    ddp, fsdp = (found(step_of(), 32, ranks=4, strategy=name) for name in ("ddp", "fsdp"))
    for part in ("parameters and buffers", "gradients", "optimiser state", "averaged weights"):
        assert fsdp.memory[part] == ddp.memory[part] / 4
    assert ddp.tokens == fsdp.tokens == 4 * 32


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy 'ddq' \\(did you mean 'ddp'"):
        found(step_of(), 32, ranks=2, strategy="ddq")
    with pytest.raises(ValueError, match="FSDP has sharded"):
        found(step_of(segment=8), 32, ranks=2, strategy="fsdp")
    with pytest.raises(ValueError, match="64 ranks for rows of 32 tokens"):
        found(step_of(), 32, ranks=64)
    two_sided = TrainingStep(
        ClassifyTask({"name": "text"}, BackboneConfig(dim=8, depth=1, direction="both"), {"num_classes": 2}), {}
    )
    with pytest.raises(ValueError, match="sequence parallelism needs a streaming model"):
        found(two_sided, 32, ranks=2, strategy="sequence_parallel")
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        find_device("h10")


def test_roofline() -> None:
    device = Device("d", {"float32": 100.0, "bfloat16": 400.0}, 10.0, 1.0, 1.0, 0.5, waits=True)
    counts = {
        "flops products float32": 1000.0, "moved products float32": 50.0, "flops products bfloat16": 400.0,
        "moved products bfloat16": 80.0, "moved elementwise int64": 30.0, "kernels": 4.0,
    }  # fmt: skip
    assert roofline(counts, device) == {"products": 10.0 + 8.0, "elementwise": 3.0, "starting kernels": 2.0}
    assert all(d.peaks["bfloat16"] > d.peaks["float32"] for d in DEVICES.values())


def test_what_is_supposed_is_said() -> None:
    def notes(**backbone: object) -> str:
        task = AutoregressTask({"name": "text"}, BackboneConfig(dim=16, depth=1, **backbone))  # type: ignore[arg-type]
        return "; ".join(found(TrainingStep(task, {}), 32, rows=2).notes)

    assert notes() == ""
    assert "an even share of the tokens" in notes(ffn={"name": "switch", "experts": 2})
    assert "the length aimed at" in notes(parts=[{"dynamic": 4, "parts": ["mamba2"]}])
    assert "the share of tokens aimed at" in notes(parts=[{"mixture_of_depths": 0.5, "parts": ["mamba2"]}])
