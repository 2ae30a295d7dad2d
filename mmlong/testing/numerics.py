"""Finite where training goes: under bfloat16 autocast, at large inputs, at inputs that are all zero or all the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.mixers.state import State, state_tensors
from mmlong.testing.subject import Subject

BF16_OUTPUT = 0.06
"""Allowed rms error of outputs, relative to their rms: bfloat16 keeps 8 bits (0.4 %) and a mixer is a handful of roundings deep."""
BF16_GRADIENT = 0.15


def bfloat16_autocast_works(s: Subject) -> None:
    """Forward, backward and a carried state under autocast: finite, and close to float32."""
    module = s.module(torch.float32, fresh=True)
    x = s.tokens(2, 257, dtype=torch.float32)
    weights = s.tokens(2, 257, seed=3, dtype=torch.float32)
    y, gradients, _ = _train(s, module, x, weights)
    with torch.autocast(s.device.type, dtype=torch.bfloat16):
        low, found, state = _train(s, module, x, weights)
    _near(s, low, y, BF16_OUTPUT, "outputs")
    for name, g in found.items():
        s.finite(g, f"gradient of {name}")
    _near(s, found["the inputs"], gradients["the inputs"], BF16_GRADIENT, "gradient of the inputs")
    if not s.streaming:
        return
    for i, t in enumerate(state_tensors(state)):
        if t.is_floating_point():
            s.finite(t, f"tensor {i} of the state")
    with torch.no_grad(), torch.autocast(s.device.type, dtype=torch.bfloat16):
        pieces, _ = s.in_pieces(module, x, [1, 100, 1, 155])
        single, _ = s.in_pieces(module, x, [1] * 257)
    _near(s, pieces, y, BF16_OUTPUT, "outputs in pieces of [1, 100, 1, 155]")
    _near(s, single, y, BF16_OUTPUT, "outputs one token at a time")


def large_and_flat_inputs_are_finite(s: Subject) -> None:
    """In float32, inputs 100 times too large, all zero, or one token repeated: outputs, states and gradients stay finite."""
    module = s.module(torch.float32, fresh=True)
    x = s.tokens(2, 257, dtype=torch.float32)
    weights = s.tokens(2, 257, seed=3, dtype=torch.float32)
    flat = x[:, :1].expand_as(x).contiguous()
    for what, tokens in (
        ("100 times too large", 100 * x),
        ("all zero", torch.zeros_like(x)),
        ("one token repeated", flat),
    ):
        y, gradients, state = _train(s, module, tokens, weights)
        s.finite(y, f"outputs for inputs {what}")
        for i, t in enumerate(state_tensors(state)):
            s.finite(t, f"tensor {i} of the state for inputs {what}")
        for name, g in gradients.items():
            s.finite(g, f"gradient of {name} for inputs {what}")


def _train(s: Subject, module: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor], State]:
    x = x.clone().requires_grad_()
    y, state = s.run(module, x)
    named = [("the inputs", x), *((f"parameter {n}", p) for n, p in module.named_parameters() if p.requires_grad)]
    found = torch.autograd.grad((y.float() * weights).sum(), [t for _, t in named], allow_unused=True)
    gradients = {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}
    if "the inputs" not in gradients:
        s.fail("the outputs have no gradient to the inputs")
    return y.detach(), gradients, state


def _near(s: Subject, found: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    what = f"{what} under bfloat16 autocast"
    s.finite(found, what)
    off = found.float() - expected
    error = float(off.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))
    if not error <= allowed:
        worst = int(off.square().sum((0, 2)).argmax())
        s.fail(
            f"{what}: relative rms error {error:.3g} against float32, allowed {allowed}; largest at position {worst}"
        )
