"""Several ranks are one process, for every streaming mixer in the registry: loss and gradients, pieces of unequal length, padding, documents across pieces."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, WORLDS, WORLDS_AND_MIXERS, ByteModel, cached_ranks, data, gradients, leave, model, names, start

from mmlong.backbone import segmented_loss
from mmlong.mixers import create_mixer, detach_state, list_mixers, rebuild_state, state_tensors
from mmlong.parallel import SequenceMesh, sequence_parallel_loss, take_piece


def settings(mixer: str, batch: int) -> list[dict[str, Any]]:
    """The piece at once with every row alone, and in segments with two rows together; both for one mixer only, since all that differs is ours."""
    whole, cut = {"segment": None, "rows": 1}, {"segment": 6, "rows": 2, "keep": "sqrt"}
    return [whole, cut] if mixer == "mamba2" else [whole if batch == 1 else cut]


def parallel(module: ByteModel, case: tuple[str, int], world: int, rank: int, group: Any, **options: Any) -> Any:
    """Loss and gradients of a case; without a group, of this process alone."""
    inputs, layout = data(*case)
    piece, piece_layout = take_piece(inputs, layout, world, rank)
    module.zero_grad()
    loss = sequence_parallel_loss(module, module.step, piece, group, piece_layout, **options)
    loss.backward()
    return {"loss": loss.detach().clone(), **gradients(module)}


def ranks(rank: int, world: int, folder: Path) -> None:
    """Every mixer and case, in a rank."""
    start(rank, world, folder)
    group = dist.group.WORLD
    found = {}
    for mixer, kind, batch in names(world):
        module = model(mixer)
        for options in settings(mixer, batch):
            key = f"{mixer}/{kind}/{batch}/{options['segment']}"
            found[key] = parallel(module, (kind, batch), world, rank, group, **options)
    for name, case in MORE.items():
        torch.manual_seed(1)
        found[name] = case(world, rank, group)
    torch.save(found, folder / f"rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def found_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each rank found, by the number of ranks."""
    return cached_ranks(Path(__file__), ranks, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=WORLDS)
def found(request: pytest.FixtureRequest, found_by: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return found_by(request.param)


def same(got: dict[str, Any], expected: dict[str, Any], where: str, rtol: float = 1e-7) -> None:
    for name in {**got, **expected}:
        # No gradient is one of zero: a piece may be too short for all of a mixer.
        value = expected[name] if name in expected else torch.zeros_like(got[name])
        found = got[name] if name in got else torch.zeros_like(value)
        # Over the whole tensor: in half the digits a single element may be anything.
        apart, size = (found - value).double().norm(), value.double().norm()
        assert found.dtype == value.dtype
        assert apart <= rtol * size + 0.01 * rtol, f"{where}: {name} is {float(apart):.3g} from {float(size):.3g}"


@pytest.mark.parametrize(("world", "mixer"), WORLDS_AND_MIXERS)
def test_ranks_are_one_process(found_by: Callable[[int], list[dict[str, Any]]], world: int, mixer: str) -> None:
    module = model(mixer)
    for kind, batch in CASES:
        inputs, layout = data(kind, batch)
        module.zero_grad()
        whole, _ = module.step(inputs, None, layout)
        whole.backward()
        expected = {"loss": whole.detach(), **gradients(module)}
        for options in settings(mixer, batch):
            for rank, every in enumerate(found_by(world)):
                where = f"{kind}, batch {batch}, segment {options['segment']}, rank {rank}"
                same(every[f"{mixer}/{kind}/{batch}/{options['segment']}"], expected, where)


# What the mixers do not differ in


def dropout(world: int, rank: int, group: Any) -> Any:
    """Two losses in a row, so that the second has another seed, in segments of which pieces hold a whole number; and what the global generator draws after it."""
    module = model("mamba2", dropout=0.3)
    twice = [parallel(module, ("even", 3), world, rank, group, segment=6, rows=1) for _ in range(2)]
    return {**twice[1], "first": twice[0]["loss"], "after": torch.rand(())}


def dropout_kept(world: int, rank: int, group: Any) -> Any:
    """The same in pieces whose graphs are kept: with random numbers of their own, so no reference but the piece's."""
    module = model("local", dropout=0.3)
    found = parallel(module, ("full", 3), world, rank, group)
    return {"loss": found["loss"]}


def inputs_and_state(world: int, rank: int, group: Any) -> Any:
    """Real-valued inputs and an initial state get their gradients: the inputs' on each rank, the state's on the first."""
    torch.manual_seed(0)
    mixer = create_mixer("mamba2", 8).double()
    x = torch.randn(3, 13, 8, dtype=torch.float64)
    with torch.no_grad():
        _, form = mixer(torch.randn(3, 4, 8, dtype=torch.float64))
    before = [t.clone().requires_grad_() for t in state_tensors(form)]
    (piece,), _ = take_piece([x], None, world, rank)
    piece = piece.clone().requires_grad_()

    def step(pieces: list[Any], state: Any, layout: Any) -> Any:
        y, state = mixer(pieces[0], state, layout)
        return y.sin().sum(), state

    loss = sequence_parallel_loss(mixer, step, [piece], group, state=rebuild_state(detach_state(form), before))
    loss.backward()
    states = {f"state{i}": t.grad for i, t in enumerate(before) if t.grad is not None}
    return {"loss": loss.detach(), "piece": piece.grad, **states, **gradients(mixer)}


def mean(world: int, rank: int, group: Any) -> Any:
    """Each rank's part, times the number of ranks: its mean over ranks is the gradient."""
    found = parallel(model("s4d"), ("padded", 3), world, rank, group, reduce="mean")
    if world > 1:
        for name, value in found.items():
            if name != "loss":
                dist.all_reduce(value)
                found[name] = value / world
    return found


def truncated(world: int, rank: int, group: Any) -> Any:
    return parallel(model("mamba2"), ("even", 3), world, rank, group, segment=6, truncate=True)


def evaluated(world: int, rank: int, group: Any) -> Any:
    module = model("mamba2", dropout=0.3).eval()
    inputs, layout = data("packed", 3)
    piece, piece_layout = take_piece(inputs, layout, world, rank)
    with torch.no_grad():
        return {"loss": sequence_parallel_loss(module, module.step, piece, group, piece_layout, segment=5)}


def autocast(world: int, rank: int, group: Any) -> Any:
    module = model("mamba2").float()
    inputs, _ = data("full", 3)
    piece, _ = take_piece(inputs, None, world, rank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sequence_parallel_loss(module, module.step, piece, group, rows=2)
        loss.backward()
    return {"loss": loss.detach(), **gradients(module)}


def frozen(world: int, rank: int, group: Any) -> Any:
    """A part that is not trained, and a parameter that nothing uses: neither gets a gradient."""
    module = model("s4d")
    module.embed.requires_grad_(False)
    module.unused = torch.nn.Parameter(torch.ones(2))
    return parallel(module, ("short", 1), world, rank, group)


def mesh(world: int, rank: int, group: Any) -> Any:
    """Two groups of ranks with batches of their own, and a reducer that averages over all ranks, as DDP's does."""
    module = model("s4d")
    if world == 1:
        halves = [parallel(module, (kind, 3), 1, 0, None) for kind in ("full", "padded")]
        return {name: (value + halves[1][name]) / 2 for name, value in halves[0].items()}
    of_all = SequenceMesh(world // 2)
    case = (("full", 3), ("padded", 3))[of_all.data_rank]
    place = (of_all.sequence_size, of_all.sequence_rank, of_all.sequence_group)
    found = parallel(module, case, *place, segment=6, reduce="mean")
    for name, value in found.items():
        dist.all_reduce(value)
        found[name] = value / world
    return found


def disagree(world: int, rank: int, group: Any) -> Any:
    """Ranks with other rows than the first are told, all of them, where they would otherwise wait for each other for ever."""
    module = model("s4d")
    inputs, _ = data("full", 3)
    with pytest.raises(ValueError, match=r"pieces of the same rows.*\(3, 1, 29\), \(2, 1, 29\)"):
        sequence_parallel_loss(module, module.step, [t[: 3 - (rank > 0)] for t in inputs], group)
    return {}


MORE = {
    case.__name__: case
    for case in (dropout, dropout_kept, inputs_and_state, mean, mesh, truncated, evaluated, autocast, frozen, disagree)
}


@pytest.mark.parametrize("name", ["dropout", "mean", "mesh", "truncated", "evaluated", "autocast", "frozen"])
def test_the_number_of_ranks_changes_nothing(found: list[dict[str, Any]], name: str) -> None:
    torch.manual_seed(1)
    expected = MORE[name](1, 0, None)
    for rank, every in enumerate(found):
        same(every[name], expected, f"rank {rank}", rtol=0.05 if name == "autocast" else 1e-7)
    if name == "frozen":
        assert "embed.weight" not in expected
        assert "unused" not in expected


def test_the_reference_is_the_segmented_loss() -> None:
    """One rank is a process, whose loss is that of training in segments."""
    module = model("mamba2")
    inputs, layout = data("packed", 3)
    found = parallel(module, ("packed", 3), 1, 0, None, segment=6, rows=2)
    module.zero_grad()
    loss, _ = segmented_loss(module, module.step, inputs, 6, layout=layout)
    loss.backward()
    same(found, {"loss": loss.detach(), **gradients(module)}, "one rank")


def test_dropout_drops_and_differs_from_rank_to_rank(found: list[dict[str, Any]]) -> None:
    once = found[0]["dropout"]
    assert once["first"] != once["loss"]
    still = parallel(model("mamba2"), ("even", 3), 1, 0, None)["loss"]
    assert (once["loss"] - still).abs() > 1e-3
    assert len({float(every["dropout_kept"]["loss"]) for every in found}) == 1, "the loss is the sum of all ranks"


def test_inputs_and_the_state_before_get_gradients(found: list[dict[str, Any]]) -> None:
    expected = inputs_and_state(1, 0, None)
    pieces = torch.cat([every["inputs_and_state"]["piece"] for every in found], 1)
    torch.testing.assert_close(pieces, expected["piece"], rtol=1e-8, atol=1e-10)
    states = {key for key in expected if key.startswith("state")}
    assert len(states) == 2
    for rank, every in enumerate(found):
        got = dict(every["inputs_and_state"])
        assert {key for key in got if key.startswith("state")} == (states if rank == 0 else set())
        got["piece"] = pieces
        kept = {key: value for key, value in expected.items() if rank == 0 or key not in states}
        same(got, kept, f"rank {rank}")


def test_refuses_what_it_cannot_do() -> None:
    both = create_mixer(list_mixers(bidirectional=True)[0], 8, causal=False)
    x = torch.zeros(1, 8, 8)
    with pytest.raises(ValueError, match="sequence parallelism needs a streaming model.*both sides"):
        sequence_parallel_loss(both, lambda p, s, la: (p[0].sum(), s), [x], None)
    causal = create_mixer("s4d", 8)
    with pytest.raises(ValueError, match="segment >= 1, rows >= 1"):
        sequence_parallel_loss(causal, lambda p, s, la: (p[0].sum(), s), [x], None, rows=0)
    loss = sequence_parallel_loss(causal, lambda p, s, la: (causal(p[0], s, la)[0].sum(), s), [x], None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
