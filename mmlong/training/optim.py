"""Optimiser and schedule from a few plain settings.

Parameter groups follow the field's habits: no weight decay for vectors (norms, biases) and for what a module's ``optim_hints`` exempt, smaller steps where hints
say so (the dynamics of state-space models, Gu et al. 2022), and optionally layer-wise decay of the learning rate. timm makes the optimiser. timm only *stores*
``lr_scale``, so it is folded into each group's learning rate here.

Muon (Jordan et al. 2024) makes the update of a matrix orthogonal, which only means something for a map between features. It gets the weights of the backbone's
linear layers and nothing else: the modality's embeddings, the head, convolutions, vectors and whatever ``optim_hints`` speak of go to its fallback, AdamW. timm
decides by the names of parameters (``fallback_list``); here the modules decide, so that a new mixer need not choose its names with care.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mmlong.models.lora import LoraConfig, is_adapter, plain_name
from mmlong.registry import nearest

Schedule = Literal["cosine", "linear", "wsd", "constant"]
_LOOKAHEAD = "lookahead_"  # timm's prefix for an optimiser that looks ahead


@dataclass
class OptimConfig:
    """How to train.

    Attributes:
        name: optimiser, any of timm's that works on parameter groups (``adamw``, ``muon``, ``lion``, ``sgd``, ...).
        lr: peak learning rate.
        weight_decay: decoupled weight decay of matrices.
        betas: of Adam-like optimisers, ignored by others; null for the optimiser's own.
        options: any further options of the optimiser, e.g. ``{fallback_lr_scale: 0.1}``: Muon's usual rate of 0.02 is too high for its AdamW.
        warmup: steps of linear warm-up, at most half of the training: a run that is cut short reaches its learning rate.
        schedule: after it: ``cosine``, ``linear``, ``wsd`` (constant, then linear over the last fifth) or ``constant``.
        min_lr: final learning rate as a share of the peak.
        layer_decay: factor on the learning rate for each layer away from the head; null for none.
        ema: decay of the averaged weights that evaluation uses, smaller over the first steps (:mod:`mmlong.training.average`); 0 for none.
        freeze: patterns of the names of parameters that stay as they are; behind a ``!``, of some that train after all (:mod:`mmlong.training.freeze`).
        lora: train adapters of low rank in place of the backbone (:mod:`mmlong.models.lora`), e.g. ``{rank: 8}``; null for none.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = (0.9, 0.98)
    options: dict[str, Any] = field(default_factory=dict)
    warmup: int = 100
    schedule: Schedule = "cosine"
    min_lr: float = 0.01
    layer_decay: float | None = None
    ema: float = 0.0
    freeze: list[str] = field(default_factory=list)
    lora: LoraConfig | None = None


def optim_hints(model: nn.Module) -> dict[str, dict[str, float]]:
    """Full parameter name to the hints its module declares; see :class:`mmlong.mixers.Mixer`."""
    return {
        f"{prefix}.{name}" if prefix else name: hint
        for prefix, module in model.named_modules()
        for name, hint in getattr(module, "optim_hints", {}).items()
    }


def _known(name: str) -> None:
    """Raise ``ValueError`` unless timm has an optimiser of this name."""
    from timm.optim import list_optimizers

    known = [str(one) for one in list_optimizers()]
    if name.lower().removeprefix(_LOOKAHEAD) not in known:
        raise ValueError(f"optim.name: there is no optimiser {name!r}{nearest(name, known)}")


def hybrid(name: str) -> bool:
    """Whether an optimiser of timm's sends some parameters to a fallback, as Muon does."""
    from timm.optim import Muon, get_optimizer_class

    _known(name)
    made = get_optimizer_class(name.lower().removeprefix(_LOOKAHEAD), bind_defaults=False)
    return isinstance(made, type) and issubclass(made, Muon)


def maps_of_features(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers between features, which Muon is for: those of the ``backbone``, where a model has one."""
    backbone = getattr(model, "backbone", model)
    maps = {id(module.weight) for module in backbone.modules() if type(module) is nn.Linear}
    return {name for name, p in model.named_parameters() if id(p) in maps}


def parameter_groups(model: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of trained parameters by their learning rate and weight decay, and for Muon by which of its two rules they follow.

    Raises:
        ValueError: a hint names a parameter that is not there, or an option it does not know; or no parameter trains.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model trains: all are frozen")
    hints = optim_hints(model)
    known = {plain_name(name) for name, _ in model.named_parameters()}
    for name, hint in hints.items():
        if name not in known:
            raise ValueError(f"optim_hints name {name!r}, which is no parameter of the model")
        if unknown := set(hint) - {"lr_scale", "weight_decay"}:
            raise ValueError(f"optim_hints of {name!r} have unknown options {sorted(unknown)}")
    depth: dict[str, int] = {}
    if config.layer_decay is not None:
        from timm.models import group_parameters

        depth = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(depth.values(), default=0)
    # An optimiser without a fallback has no use for the distinction.
    first_rule = maps_of_features(model) - hints.keys() if hybrid(config.name) else set(named)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, p in named.items():
        # What a module asks for its weight is not for the adapter of that.
        hint = {} if is_adapter(name) else hints.get(plain_name(name), {})
        decay = hint.get("weight_decay", 0.0 if p.ndim <= 1 else config.weight_decay)
        layers = last - depth.get(name, last)
        scale = hint.get("lr_scale", 1.0) * (config.layer_decay**layers if config.layer_decay is not None else 1.0)
        fallback = name not in first_rule
        group = groups.setdefault(
            (scale, decay, fallback), {"params": [], "lr": config.lr * scale, "weight_decay": decay}
        )
        if fallback:
            group["use_fallback"] = True
        group["params"].append(p)
    return list(groups.values())


def schedule_factor(step: int, config: OptimConfig, total: int) -> float:
    """Share of the peak learning rate at ``step`` of ``total``."""
    warmup = min(config.warmup, total // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    if config.schedule == "wsd":
        done = max(0.0, (done - 0.8) / 0.2)
    shape = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.min_lr + (1 - config.min_lr) * shape


def build_optimizer(model: nn.Module, config: OptimConfig, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimiser and its schedule, to be stepped once a step.

    Raises:
        ValueError: timm has no optimiser of this name, or it does not take one of the options.
    """
    from timm.optim import create_optimizer_v2

    options = {**({} if config.betas is None else {"betas": tuple(config.betas)}), **config.options}
    groups: Any = parameter_groups(model, config)
    try:
        optimizer = create_optimizer_v2(
            groups, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **options
        )
    except TypeError as error:
        raise ValueError(f"optim: {config.name} does not take these options: {error}") from error
    return optimizer, LambdaLR(optimizer, partial(schedule_factor, config=config, total=total_steps))
