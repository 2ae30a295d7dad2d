"""A name for exactly these weights: SHA-256 over a state dict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over every tensor of the state dict, in order of their names: name, dtype, shape and bytes. It is the same on every device.

    It knows nothing of options without weights, such as a window's width.
    """
    return fingerprint_of(model.state_dict())


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors by name."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
