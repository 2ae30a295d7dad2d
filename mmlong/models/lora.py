"""LoRA: a trained model is adapted by adding a matrix of low rank to each of its projections (Hu et al. 2021, arXiv 2106.09685).

    W' = W + (alpha / r) B A        A (r, in) drawn, B (out, r) zero at first; W held as it is

:func:`add_lora` does that to a model, :func:`merge_lora` leaves one with ``W'`` in the place of ``W`` and nothing else, to the bit the same function.

**A weight is adapted, not a layer.** torch's parametrizations make ``module.weight`` the sum, so whoever reads it gets it: layers that are called, but also what most mixers here do for speed and memory, that is, hand
``weight`` to a fused function, to blocks of tokens that are computed again in the backward, or to a filter that is made once and kept; and matrices that are in no ``nn.Linear``. PEFT puts a layer of its own in the
place of ``nn.Linear`` and adds to what that layer returns. Here its adapters would be passed by in silence wherever the layer is not called, and it brings transformers and accelerate with it. So this is a small form of its own;
nothing of it is in PEFT's file format.

What that costs: the gradient of a whole weight is made before it becomes those of A and B, so a step takes the arithmetic of full training and saves optimiser state, gradients kept and bytes to store. ``W'`` is made
at each use: little beside thousands of tokens, much beside one, so :func:`mmlong.generation.generate` merges while it draws (:func:`merged`). Modules with adapters are not pickled (torch refuses), which ``ddp_spawn`` would need; ``ddp`` does not.

Departures from the paper's code: A is normal with variance ``1 / in`` where that draws uniformly; dropout is on the inputs of A as there, but the same channels are dropped for all tokens that one use of the weight reads; ranks are at most what the matrix has.

In the state dict a weight is ``X.parametrizations.weight.original``, its adapter ``X.parametrizations.weight.0.a``, ``.b`` and ``.scale``. A state dict of the model without adapters loads all the same: names are
translated and adapters stay as they are. What is saved for others is :func:`plain_state`, by the names of a model without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmlong.models.patterns import matching, no_match

_PART = re.compile(r"^(|.*\.)parametrizations\.(\w+)\.(original|0\.(?:a|b|scale))$")


@dataclass
class LoraConfig:
    """Adapters of low rank.

    Attributes:
        rank: r; of a matrix that has fewer rows or columns, as many as it has.
        alpha: the sum is weighed by ``alpha / rank``.
        dropout: chance that a channel of A's inputs is dropped in training.
        on: patterns (:mod:`mmlong.models.patterns`) of the weights that get one; empty: of every linear layer in the backbone. A pattern takes the linear layers' weights that it matches; one that matches none takes other parameters of two or more
            dimensions, each matrix of the last two by itself.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    on: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it is at least 1")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}; it is above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it is at least 0 and below 1")


def low_rank_sum(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``weight + scale * b @ a``, in the weight's own precision under autocast too."""
    with torch.autocast(weight.device.type, enabled=False):
        return weight + scale * (b @ a)


class LowRank(nn.Module):
    """The adapter of a weight ``(..., out, in)``.

    Args:
        weight: the weight.
        config: see :class:`LoraConfig`.
    """

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        *lead, rows, columns = weight.shape
        some = min(config.rank, rows, columns)
        # With the weight's device and dtype, and no graph to it.
        like = weight.detach()
        self.a = nn.Parameter(like.new_empty(*lead, some, columns).normal_(std=columns**-0.5))
        self.b = nn.Parameter(like.new_zeros(*lead, rows, some))
        self.register_buffer(
            "scale", torch.full((), config.alpha / config.rank, dtype=weight.dtype, device=weight.device)
        )
        self.scale: Tensor
        self.dropout = config.dropout
        self.folded: Tensor | None = None
        """The sum, where it is kept for a while; see :func:`merged`."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is used."""
        if self.folded is not None:
            if self.training:
                raise RuntimeError(
                    "the adapters are merged for a while, and no gradient would reach them: train outside"
                )
            return self.folded
        a: Tensor = self.a
        if self.training and self.dropout:
            a = a * F.dropout(torch.ones_like(a[..., :1, :]), self.dropout)
        return low_rank_sum(weight, a, self.b, self.scale)


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, LowRank]]:
    """Of every adapted weight: its name in a model without adapters, the module it is in, its name there, and the adapter."""
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, made in module.parametrizations.items():  # type: ignore[union-attr,operator]
            if isinstance(made[0], LowRank):
                yield (f"{prefix}.{name}" if prefix else name), module, name, made[0]


def plain_name(name: str) -> str:
    """The name of a parameter or buffer in a model without adapters; ``X.weight.lora_a`` and so on for what only adapters have."""
    found = _PART.match(name)
    if found is None:
        return name
    part = found[3].removeprefix("0.")
    return f"{found[1]}{found[2]}" + ("" if part == "original" else f".lora_{part}")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name in ``named_parameters`` is an adapter's."""
    found = _PART.match(name)
    return found is not None and found[3] != "original"


def _weights(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each parameter of two or more dimensions is, by its name."""
    found = {}
    for prefix, module in model.named_modules():
        # torch's recurrent layers keep a list of their weights, which an adapter would not change.
        if isinstance(module, nn.RNNBase | parametrize.ParametrizationList):
            continue
        for name, p in module._parameters.items():
            if p is not None and p.ndim >= 2 and p.is_floating_point():
                found[f"{prefix}.{name}" if prefix else name] = module, name
    return found


def _chosen(model: nn.Module, body: nn.Module, config: LoraConfig) -> dict[str, tuple[nn.Module, str]]:
    """The weights that get an adapter."""
    weights = _weights(model)
    linear = {name for name, (module, at) in weights.items() if isinstance(module, nn.Linear) and at == "weight"}
    if not config.on:
        inside = {id(module) for module in body.modules()}
        names = [name for name, (module, _) in weights.items() if name in linear and id(module) in inside]
        if not names:
            raise ValueError("lora: the backbone has no linear layer; name the weights that get an adapter in lora.on")
        return {name: weights[name] for name in names}
    chosen: dict[str, tuple[nn.Module, str]] = {}
    for pattern in config.on:
        names = matching(weights, pattern, "lora.on")
        if not names:
            raise ValueError(no_match(weights, pattern, "lora.on"))
        names = [name for name in names if name in linear] or names
        chosen.update((name, weights[name]) for name in names)
    return chosen


def add_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Give weights of a model their adapters, and hold the rest of its backbone: adapters train, and what stands outside of the backbone.

    The model's function is the same to the bit until an adapter is trained. Of a module without a ``backbone`` everything is held.

    Args:
        model: changed in place; its ``lora`` is ``config`` afterwards.
        config: see :class:`LoraConfig`.

    Returns:
        names of the adapted weights.

    Raises:
        ValueError: there are adapters already, a pattern matches nothing, or a weight belongs to two modules, which adapters would part.
    """
    if next(adapters(model), None) is not None:
        raise ValueError("the model has adapters already: merge_lora or remove_lora first")
    body = getattr(model, "backbone", model)
    chosen = _chosen(model, body, config)
    places: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                places.setdefault(id(p), set()).add(id(module))
    for name, (module, at) in chosen.items():
        if len(places[id(module._parameters[at])]) > 1:
            raise ValueError(
                f"lora: {name} is the weight of two modules, which an adapter would part; leave it out of lora.on"
            )
        if hasattr(nn.ModuleDict, at):
            raise ValueError(
                f"lora: torch adapts no parameter that is called {at!r}, as {name} is; leave it out of lora.on"
            )
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"lora: {name} belongs to a module with a parametrization of its own; leave it out of lora.on"
            )
    body.requires_grad_(False)
    for module, at in chosen.values():
        weight = getattr(module, at)
        weight.requires_grad_(False)
        parametrize.register_parametrization(module, at, LowRank(weight, config), unsafe=True)
        if not any(getattr(hook, "hook", None) is _translate for hook in module._load_state_dict_pre_hooks.values()):
            module.register_load_state_dict_pre_hook(_translate)
    model.lora = config  # type: ignore[assignment]
    return list(chosen)


def _translate(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a module with adapters load a state dict without: its weights are the originals', the adapters' stay."""
    for _, owner, name, adapter in adapters(module):
        if owner is module and f"{prefix}{name}" in state:
            inside = f"{prefix}parametrizations.{name}."
            state[f"{inside}original"] = state.pop(f"{prefix}{name}")
            for part, tensor in adapter.state_dict().items():
                state.setdefault(f"{inside}0.{part}", tensor)


def _take_off(model: nn.Module, merge: bool) -> None:
    # Not torch's `remove_parametrizations`: it takes the property off a class that copies of the module share.
    for module in {id(module): module for _, module, _, _ in adapters(model)}.values():
        made = dict(module.parametrizations.items())  # type: ignore[union-attr,operator]
        with torch.no_grad():
            if merge:
                for one in made.values():
                    one.original.copy_(low_rank_sum(one.original, one[0].a, one[0].b, one[0].scale))
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]  # type: ignore[assignment]
        for name, one in made.items():
            module.register_parameter(name, one.original)
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", None) is _translate:
                del module._load_state_dict_pre_hooks[key]
    model.__dict__.pop("lora", None)


def merge_lora(model: nn.Module) -> None:
    """Put ``W + (alpha / r) B A`` in the place of every adapted weight; adapters are gone. Which parameters train is left as it is."""
    _take_off(model, True)


def remove_lora(model: nn.Module) -> None:
    """Take the adapters off: the model is the one they were added to, to the bit. Which parameters train is left as it is."""
    _take_off(model, False)


def _original(module: nn.Module, name: str) -> Tensor:
    made: Any = module.parametrizations
    return made[name].original


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """While it is entered adapted weights are made once and kept, so that a token costs what it does without adapters; in evaluation only. Afterwards everything is as before, to the bit."""
    found = [(_original(module, name), one) for _, module, name, one in adapters(model)]
    found = [(weight, one) for weight, one in found if one.folded is None]
    try:
        for weight, one in found:
            with torch.no_grad():
                one.folded = low_rank_sum(weight, one.a, one.b, one.scale)
        yield
    finally:
        for _, one in found:
            one.folded = None


def fold(tensors: Mapping[str, Tensor], merge: bool = True) -> dict[str, Tensor]:
    """A state dict by the names of a model without adapters, which are merged into the weights (``merge``) or left out; one without adapters as it is."""
    plain = {}
    for name, tensor in tensors.items():
        found = _PART.match(name)
        root = "" if found is None else f"{found[1]}parametrizations.{found[2]}.0."
        if found is None or f"{root}a" not in tensors:
            plain[name] = tensor
        elif found[3] == "original":
            parts = [tensors[f"{root}{part}"] for part in ("a", "b", "scale")]
            plain[f"{found[1]}{found[2]}"] = low_rank_sum(tensor, *parts) if merge else tensor
    return plain


@torch.no_grad()
def plain_state(module: nn.Module, merge: bool = True) -> dict[str, Tensor]:
    """The state dict by the names of a module without adapters; see :func:`fold`."""
    return fold(module.state_dict(), merge)
