"""What the ranks compute and one process compares: imported by both."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.heads import CategoricalHead
from mmlong.layout import Layout
from mmlong.mixers import list_mixers
from mmlong.testing.kinds import KINDS_OF_STATE

CODES = 11
OPTIONS: dict[str, Any] = {
    "gmlp": {"max_length": 32},
    "local": {"window": 5},
    "masked_conv2d": {"width": 6, "radius": 1},
    "masked_conv3d": {"height": 3, "width": 3},
    "synthesizer_dense": {"max_length": 32},
    "synthesizer_random": {"max_length": 32},
}
"""Windows that reach from rank to rank; weights of positions that are no more than there are."""


class ByteModel(nn.Module):
    """Embedding, two blocks, logits."""

    causal = True

    def __init__(self, mixer: str, dropout: float = 0.0) -> None:
        super().__init__()
        mixers = [{"name": mixer, **OPTIONS.get(mixer, {})}]
        self.embed = nn.Embedding(CODES, 8)
        self.backbone = Backbone(BackboneConfig(dim=8, depth=2, mixers=mixers, dropout=dropout, drop_path=dropout))
        self.head = CategoricalHead(8, CODES)

    @property
    def streaming(self) -> bool:
        return self.backbone.streaming

    def step(self, pieces: list[Tensor], state: Any, layout: Layout | None) -> tuple[Tensor, Any]:
        codes, targets = pieces
        x, state = self.backbone(self.embed(codes), state, layout)
        return self.head.loss(self.head(x), targets, layout)[0], state


def model(mixer: str, dropout: float = 0.0) -> ByteModel:
    torch.manual_seed(0)
    return ByteModel(mixer, dropout).double()


def data(kind: str, batch: int) -> tuple[list[Tensor], Layout | None]:
    """Codes and targets, and their layout. ``short`` is so short that the last of four ranks has nothing; of ``even``, pieces are whole segments of 6."""
    length = {"short": 5, "even": 24}.get(kind, 29)
    draw = torch.Generator().manual_seed(batch)
    inputs = list(torch.randint(CODES, (2, batch, length), generator=draw))
    if kind in ("full", "short"):
        return inputs, None
    lengths = torch.tensor([11] if batch == 1 else [length, 17, 3])
    if kind == "padded":
        return inputs, Layout(lengths=lengths)
    resets = torch.zeros(batch, length, dtype=torch.bool)
    # At a piece's first and last position, at neighbours, and at the very beginning.
    resets[0, [4, 8]] = True
    resets[-1, [0, 14, 15, 16]] = True
    return inputs, Layout(lengths=lengths, resets=resets)


CASES = [(kind, batch) for kind in ("full", "padded", "packed", "short") for batch in (1, 3)]


def mixers(world: int) -> list[str]:
    """All that stream, on two ranks. What more ranks add is the handing on, which knows states only by their tensors: one of each kind."""
    return list_mixers(streaming=True) if world <= 2 else list(KINDS_OF_STATE)


def names(world: int) -> Iterator[tuple[str, str, int]]:
    for mixer in mixers(world):
        for kind, batch in CASES:
            yield mixer, kind, batch


WORLDS = (2, pytest.param(4, marks=pytest.mark.slow))
WORLDS_AND_MIXERS = [
    pytest.param(world, mixer, marks=pytest.mark.slow if world > 2 else ())
    for world in (2, 4)
    for mixer in mixers(world)
]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def all_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Zero where there is none: a piece may be too short for all of a mixer."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained}


def start(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)


def leave() -> None:
    dist.barrier()  # a rank that leaves while the other still sends can abort in gloo
    dist.destroy_process_group()


def spawn(script: Path, function: Callable[..., None], world: int, folder: Path, seconds: float = 1500) -> None:
    """Run ``function(rank, world, folder)`` of a file in ``world`` processes, forked from one that has imported everything and computed nothing."""
    code = (
        f"import sys; from pathlib import Path; sys.path[:0] = {[str(script.parent)]!r}; import {script.stem} as here; "
        "import torch.multiprocessing as mp; "
        f"mp.start_processes(here.{function.__name__}, ({world}, Path({str(folder)!r})), {world}, start_method='fork')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=seconds, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def cached_ranks(script: Path, function: Callable[..., None], folder: Path) -> Callable[[int], list[dict[str, Any]]]:
    """``found(world)``: what each of ``world`` ranks saved, run once for each world. What failed once is not run again: every test that asks says why."""
    failed: dict[int, BaseException] = {}

    @functools.cache
    def found(world: int) -> list[dict[str, Any]]:
        if world in failed:
            raise failed[world]
        here = folder / str(world)
        here.mkdir()
        try:
            spawn(script, function, world, here)
        except BaseException as error:
            failed[world] = error
            raise
        return [torch.load(here / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return found
