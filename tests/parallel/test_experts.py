"""Experts on two ranks are those of one process: outputs, losses, drops and gradients in float64, also where a rank has no tokens; under DDP; and what is saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from cases import gradients, leave, spawn, start

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.experts import Experts
from mmlong.layout import Layout
from mmlong.mixers.own_loss import own_losses
from mmlong.models import load_model, save_model
from mmlong.parallel import (
    clip_grad_norm_over_ranks,
    expert_parallel,
    leave_experts_to_their_ranks,
    own_expert_names,
    sequence_parallel_loss,
    whole_experts,
)
from mmlong.tasks import AutoregressTask

CASES: dict[str, dict[str, Any]] = {
    "switch": {"name": "switch", "capacity": 0.6, "balance": 0.5, "z": 0.2},
    "st_moe": {"name": "st_moe", "capacity": 0.6, "balance": 0.5, "z": 0.2},
    "no limit": {"name": "st_moe", "capacity": None},
    "evaluated": {"name": "switch", "capacity": 0.5},
    "checkpoint": {"name": "st_moe", "capacity": 0.6},
    "empty": {"name": "st_moe", "capacity": 0.6, "balance": 0.5},
}
ROWS = {0: slice(0, 2), 1: slice(2, 3)}


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    ffn = {"experts": 4, **CASES[name]}
    made = Backbone(BackboneConfig(dim=8, depth=2, mixers=["s4d"], ffn=ffn, checkpoint=name == "checkpoint")).double()
    for m in made.modules():
        if isinstance(m, Experts):
            m.router.weight.data.mul_(5)
    return made.train(name != "evaluated")


def batch(name: str) -> tuple[Tensor, Tensor, Layout]:
    draw = torch.Generator().manual_seed(1)
    x, weights = torch.randn(2, 3, 13, 8, dtype=torch.float64, generator=draw)
    return x, weights, Layout(lengths=torch.tensor([13, 5, 0 if name == "empty" else 11]))


def run(model: Any, x: Tensor, weights: Tensor, layout: Layout) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with own_losses() as found:
        y = model(x, None, layout)[0]
    valid = layout.valid(x.shape[1])
    assert valid is not None
    own = torch.stack([total for _, total, _ in found] or [torch.zeros((), dtype=torch.float64)]).sum()
    ((y * weights)[valid].sum() + own).backward()
    assert x.grad is not None
    dropped = torch.stack([m.dropped for m in model.modules() if isinstance(m, Experts)])
    tokens = torch.tensor([int(count) for *_, count in found])
    return {"y": torch.where(valid[..., None], y.detach(), 0), "own": own.detach(), "tokens": tokens, "dropped": dropped, "dx": x.grad}  # fmt: skip


def text_model() -> Any:
    torch.manual_seed(3)
    backbone = BackboneConfig(dim=8, depth=2, ffn={"name": "switch", "experts": 4, "capacity": 0.6})
    return AutoregressTask({"name": "text"}, backbone).model.double()


def text_step(model: Any, codes: Tensor, ranks: int = 1) -> None:
    prediction, _ = model(codes)
    # Equal rows on every rank: a mean over ranks of means over rows.
    loss = torch.nn.functional.cross_entropy(prediction.flatten(0, 1), codes.flatten())
    loss.backward()


def codes() -> Tensor:
    return torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(5))


def ranks(rank: int, world: int, folder: Path) -> None:
    start(rank, world, folder)
    out: dict[str, Any] = {}
    for name in CASES:
        x, weights, layout = batch(name)
        assert layout.lengths is not None
        rows = ROWS[rank]
        model: Any = expert_parallel(build(name), reduce="sum")
        got = run(model, x[rows], weights[rows], Layout(lengths=layout.lengths[rows]))
        alone = own_expert_names(model)
        for key, value in gradients(model).items():
            if key not in alone:
                dist.all_reduce(value)
            got[f"grad {key}"] = value
        out[name] = got
    model = text_model()
    expert_parallel(model)
    leave_experts_to_their_ranks(model)
    with whole_experts(model):
        if rank == 0:
            save_model(model, folder / "before")
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    mine = codes()[2 * rank : 2 * rank + 2]
    for _ in range(2):  # accumulated
        text_step(ddp, mine)
    norm = clip_grad_norm_over_ranks(model, 0.1)
    optimiser.step()
    kept = [p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()]
    with whole_experts(model):
        if rank == 0:
            save_model(model, folder / "after")
    out["text"] = {"norm": norm, "same": torch.tensor(all(a is b for a, b in zip(kept, [p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()], strict=True)))}  # fmt: skip
    try:
        sequence_parallel_loss(model, lambda *_: None, [mine], dist.group.WORLD)  # type: ignore[arg-type,return-value]
    except ValueError as error:
        out["text"]["refused"] = torch.tensor("of one sequence" in str(error))
    try:
        expert_parallel(Backbone(BackboneConfig(dim=8, ffn={"name": "switch", "experts": 3})))
    except ValueError as error:
        out["text"]["odd"] = torch.tensor("3 experts cannot be spread over 2 ranks" in str(error))
    torch.save(out, folder / f"rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("experts")
    spawn(Path(__file__), ranks, 2, made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_are_one_process(found: list[dict[str, Any]], name: str) -> None:
    model = build(name)
    want = run(model, *batch(name))
    one, other = found[0][name], found[1][name]
    for key in ("y", "dx"):
        torch.testing.assert_close(torch.cat([one[key], other[key]]), want[key])
    torch.testing.assert_close(one["own"] + other["own"], want["own"])
    if name != "empty" and len(want["tokens"]):
        torch.testing.assert_close(one["tokens"] + other["tokens"], want["tokens"])
    assert torch.equal(one["dropped"], want["dropped"])
    assert torch.equal(other["dropped"], want["dropped"])
    if "limit" not in name and name != "evaluated":
        assert bool((want["dropped"][:, 0] > 0).all())
    theirs: set[str] = set()
    for key, value in gradients(model).items():
        holders = [got for got in (one, other) if f"grad {key}" in got]
        expert = ".experts." in key
        assert len(holders) == (1 if expert else 2), key
        theirs |= {key} if expert else set()
        for got in holders:
            torch.testing.assert_close(got[f"grad {key}"], value, msg=lambda m, k=key: f"{k}: {m}")
    assert len(theirs) == 2 * 4 * 4


def test_what_is_saved_is_what_one_process_saves(folder: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    """To the byte before a step, and after one of DDP, accumulated and clipped over ranks, to rounding."""
    model = text_model()
    save_model(model, tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (folder / "before" / file).read_bytes() == (tmp_path / file).read_bytes()
    for _ in range(2):
        text_step(model, codes())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    got, want = load_model(folder / "after").state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value.float(), msg=lambda m, k=key: f"{k}: {m}")
    for each in found:
        torch.testing.assert_close(each["text"]["norm"], norm)
        assert all(bool(each["text"][key]) for key in ("same", "refused", "odd"))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"spreads experts \(backbone.ffn: switch or st_moe\).*found 0"):
        expert_parallel(Backbone(BackboneConfig(dim=8)))
    with pytest.raises(ValueError, match="spread over 0"):
        clip_grad_norm_over_ranks(build("switch"), 1.0)
