"""Train a tiny model on a probe, and ask it: one cell of the table."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.diagnose.probes import PROBES, SILENT, Probe, Size
from mmlong.mixers.own_loss import mean_own_loss, own_losses
from mmlong.training.optim import OptimConfig, build_optimizer

SOLVED = 0.999
"""Accuracy on fresh training sequences at which training ends early, unless the probe is patient."""
LOOK = 100
"""Steps between two looks at it."""
ASKED_TOKENS = 1 << 17
"""Tokens that a test asks about in all, in batches of the training's rows; at least one batch."""


@dataclass(frozen=True)
class Setting:
    """How a cell is learned.

    Attributes:
        mixer: a name, or a mapping of ``name`` and options, as a recipe has it; or a mapping of a ``name`` of your own and ``parts``, which then are the backbone (:mod:`mmlong.backbone.parts`), whatever its depth.
        probe: a name.
        dim, depth: of the backbone, whose blocks have a SwiGLU of twice the width.
        seed: of weights and sequences.
        scale: of the probe's number of steps.
        lr: peak learning rate; ``None`` for the probe's, which was chosen at a width of 64.
    """

    mixer: Any
    probe: str
    dim: int = 64
    depth: int = 2
    seed: int = 0
    scale: float = 1.0
    lr: float | None = None

    @property
    def name(self) -> str:
        """The mixer, with its options."""
        if isinstance(self.mixer, str):
            return self.mixer
        options = ",".join(f"{key}={value}" for key, value in self.mixer.items() if key not in ("name", "parts"))
        return f"{self.mixer['name']}:{options}" if options else str(self.mixer["name"])

    @property
    def key(self) -> str:
        """What tells cells apart."""
        rate = "" if self.lr is None else f" / lr {self.lr:g}"
        return f"{self.name} / {self.probe} / {self.dim} x {self.depth} / {self.scale:g}{rate} / seed {self.seed}"


@dataclass
class Cell:
    """What was found.

    Attributes:
        setting: what was learned.
        accuracy: by the test's name.
        steps: taken; fewer than the probe's where it was solved before.
        loss: of the last batch that had one.
        seconds: of training and asking.
        parameters: of the model.
        failed: why there is no accuracy.
    """

    setting: Setting
    accuracy: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    loss: float | None = None
    seconds: float = 0.0
    parameters: int = 0
    failed: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Cell:
        """What :meth:`as_dict` made."""
        return cls(**{**plain, "setting": Setting(**plain["setting"])})


class ProbeModel(nn.Module):
    """Embedding, backbone, answers: of every position, or ``from_last`` of them decoded from the last one with an embedding of which (MAD's form).

    Args:
        probe: what is asked.
        backbone: causal.
    """

    def __init__(self, probe: Probe, backbone: BackboneConfig) -> None:
        super().__init__()
        dim = backbone.dim
        assert isinstance(dim, int)
        self.embed = nn.Embedding(probe.vocabulary, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.backbone = Backbone(backbone)
        self.which = nn.Parameter(torch.randn(probe.from_last, dim)) if probe.from_last else None
        self.decoder = (
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, probe.vocabulary))
            if probe.from_last
            else nn.Linear(dim, probe.vocabulary)
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Codes ``(B, L)`` to logits ``(B, L or from_last, vocabulary)``."""
        x, _ = self.backbone(self.embed(codes))
        return self.decoder(x if self.which is None else x[:, -1:] + self.which)


def _batch(probe: Probe, rng: np.random.Generator, rows: int, size: Size) -> tuple[Tensor, Tensor]:
    codes, answers = probe.draw(rng, rows, **size)
    return torch.from_numpy(codes), torch.from_numpy(answers)


def _right(logits: Tensor, answers: Tensor) -> tuple[int, int]:
    asked = answers != SILENT
    return int((logits.argmax(-1)[asked] == answers[asked]).sum()), int(asked.sum())


def probe_model(setting: Setting) -> ProbeModel:
    """The model that a setting learns, untrained."""
    parts = [] if isinstance(setting.mixer, str) else setting.mixer.get("parts", [])
    mixers = ["mamba2"] if parts else [setting.mixer]
    backbone = BackboneConfig(dim=setting.dim, depth=setting.depth, mixers=mixers, parts=parts, ffn_ratio=2.0)
    return ProbeModel(PROBES[setting.probe], backbone)


def learn(setting: Setting, told: Callable[[int, int, float], None] | None = None) -> Cell:
    """Train and ask: :func:`learn_model`'s cell."""
    return learn_model(setting, told)[0]


def learn_model(setting: Setting, told: Callable[[int, int, float], None] | None = None) -> tuple[Cell, ProbeModel]:
    """Train and ask; what was found, and the model.

    Args:
        setting: what and how.
        told: called with ``(step, steps, accuracy of the last look)``.

    Raises:
        ValueError: a mixer that is not causal, or whose options do not fit.
        KeyError: an unknown mixer or probe.
    """
    probe, begun = PROBES[setting.probe], time.perf_counter()
    torch.manual_seed(setting.seed)
    model = probe_model(setting)
    cell = Cell(setting, parameters=sum(p.numel() for p in model.parameters()))
    steps = max(1, round(probe.steps * setting.scale))
    config = OptimConfig(
        lr=probe.lr if setting.lr is None else setting.lr,
        weight_decay=probe.weight_decay,
        warmup=min(50, steps // 5 + 1),
    )
    optimizer, schedule = build_optimizer(model, config, steps)
    rng = np.random.default_rng([setting.seed, 0])
    looked = 0.0
    for step in range(steps):
        codes, answers = _batch(probe, rng, probe.rows, probe.train[step % len(probe.train)])
        # What a mixer asks for itself (a compressor's reconstruction, a span's price) is trained as the tasks train it.
        asked: AbstractContextManager[list[Any]] = own_losses() if model.backbone.has_own_loss else nullcontext([])
        with asked as found:
            logits = model(codes)
            own = mean_own_loss(found)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=SILENT)
        loss = loss if own is None else loss + own
        if not bool(torch.isfinite(loss)):
            cell.failed = f"the loss is {float(loss)} at step {step + 1}"
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        cell.steps, cell.loss = step + 1, float(loss.detach())
        if (step + 1) % LOOK == 0 or step + 1 == steps:
            looked = ask(model, probe, probe.train, setting.seed, 2 + step)
            if told is not None:
                told(step + 1, steps, looked)
            if looked >= SOLVED and not probe.patient:
                break
    if not cell.failed:
        cell.accuracy = {name: ask(model, probe, (size,), setting.seed, 1) for name, size in probe.tests.items()}
    cell.seconds = time.perf_counter() - begun
    return cell, model


@torch.no_grad()
def ask(model: nn.Module, probe: Probe, sizes: tuple[Size, ...], seed: int, stream: int) -> float:
    """Share of right answers on fresh sequences of some sizes.

    Args:
        stream: which sequences of the seed; training has number 0.
    """
    model.eval()
    rng = np.random.default_rng([seed, stream])
    right = asked = 0
    for size in sizes:
        tokens = 0
        while tokens < ASKED_TOKENS // len(sizes) // (1 if stream == 1 else 4):
            codes, answers = _batch(probe, rng, probe.rows, size)
            found = _right(model(codes), answers)
            right, asked, tokens = right + found[0], asked + found[1], tokens + codes.numel()
    model.train()
    return right / asked
