"""Optimiser and schedule from a few plain settings.

Parameter groups follow the field's habits: no weight decay for vectors (norms, biases) and for what a module's ``optim_hints`` exempt, smaller steps where hints
say so (the dynamics of state-space models, Gu et al. 2022), and optionally layer-wise decay of the learning rate. timm makes the optimiser. timm only *stores*
``lr_scale``, so it is folded into each group's learning rate here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "linear", "wsd", "constant"]


@dataclass
class OptimConfig:
    """How to train.

    Attributes:
        name: optimiser, any of timm's that works on parameter groups (``adamw``, ``lion``, ``sgd``, ...).
        lr: peak learning rate.
        weight_decay: decoupled weight decay of matrices.
        betas: of Adam-like optimisers; null for the optimiser's own.
        warmup: steps of linear warm-up.
        schedule: after it: ``cosine``, ``linear``, ``wsd`` (constant, then linear over the last fifth) or ``constant``.
        min_lr: final learning rate as a share of the peak.
        layer_decay: factor on the learning rate for each layer away from the head; null for none.
        ema: decay of the averaged weights that evaluation uses; 0 for none.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = (0.9, 0.98)
    warmup: int = 100
    schedule: Schedule = "cosine"
    min_lr: float = 0.01
    layer_decay: float | None = None
    ema: float = 0.0


def optim_hints(model: nn.Module) -> dict[str, dict[str, float]]:
    """Full parameter name to the hints its module declares; see :class:`mmlong.mixers.Mixer`."""
    return {
        f"{prefix}.{name}" if prefix else name: hint
        for prefix, module in model.named_modules()
        for name, hint in getattr(module, "optim_hints", {}).items()
    }


def parameter_groups(model: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of trained parameters by their learning rate and weight decay.

    Raises:
        ValueError: a hint names a parameter that is not there, or an option it does not know.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hints = optim_hints(model)
    for name, hint in hints.items():
        if name not in dict(model.named_parameters()):
            raise ValueError(f"optim_hints name {name!r}, which is no parameter of the model")
        if unknown := set(hint) - {"lr_scale", "weight_decay"}:
            raise ValueError(f"optim_hints of {name!r} have unknown options {sorted(unknown)}")
    depth: dict[str, int] = {}
    if config.layer_decay is not None:
        from timm.models import group_parameters

        depth = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(depth.values(), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in named.items():
        hint = hints.get(name, {})
        decay = hint.get("weight_decay", 0.0 if p.ndim <= 1 else config.weight_decay)
        scale = hint.get("lr_scale", 1.0) * (config.layer_decay or 1.0) ** (last - depth.get(name, last))
        group = groups.setdefault((scale, decay), {"params": [], "lr": config.lr * scale, "weight_decay": decay})
        group["params"].append(p)
    return list(groups.values())


def schedule_factor(step: int, config: OptimConfig, total: int) -> float:
    """Share of the peak learning rate at ``step`` of ``total``."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min((step - config.warmup) / max(total - config.warmup, 1), 1.0)
    if config.schedule == "wsd":
        done = max(0.0, (done - 0.8) / 0.2)
    shape = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.min_lr + (1 - config.min_lr) * shape


def build_optimizer(model: nn.Module, config: OptimConfig, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimiser and its schedule, to be stepped once a step."""
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = {} if config.betas is None else {"betas": tuple(config.betas)}
    groups: Any = parameter_groups(model, config)
    optimizer = create_optimizer_v2(groups, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **options)
    return optimizer, LambdaLR(optimizer, partial(schedule_factor, config=config, total=total_steps))
