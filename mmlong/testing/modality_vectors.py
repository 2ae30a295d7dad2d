"""Embedding: values know what and not where, places know where and not what, both together are the embedding; and the modality as a module."""

from __future__ import annotations

import copy

import torch
from safetensors.torch import load, save
from torch import Tensor

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality
from mmlong.testing.modality_subject import LENGTHS, ModalitySubject


def _tokens(s: ModalitySubject, module: Modality, length: int, seed: int = 0) -> tuple[Tensor, Layout]:
    return s.encode(module, s.uneven(module, 3, length, seed), f"batch 3, length {length}")


def _values(s: ModalitySubject, module: Modality, tokens: Tensor, what: str) -> Tensor:
    with s.running(f"values of {what}, tokens {tuple(tokens.shape)}"), torch.no_grad():
        found = module.values(tokens)
    shape, dtype = (*tokens.shape[:2], s.dim), _dtype(module)
    if tuple(found.shape) != shape or found.dtype != dtype:
        s.fail(f"values of {what} must be {dtype} (B, L, D) = {shape}, are {found.dtype} {tuple(found.shape)}")
    s.finite(found, f"values of {what}")
    return found


def _dtype(module: Modality) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _places(s: ModalitySubject, module: Modality, index: Tensor | None, length: int, what: str) -> Tensor | None:
    with s.running(f"places({what}, {length})"), torch.no_grad():
        return module.places(index, length)


def values_know_no_place(s: ModalitySubject) -> None:
    """Values of rows, of pieces and of permuted tokens are rows, pieces and permutations of the values."""
    module = s.module(torch.float64)
    for length in LENGTHS:
        tokens, _ = _tokens(s, module, length)
        whole = _values(s, module, tokens, "a batch")
        total = tokens.shape[1]
        s.agree(_values(s, module, tokens[1:2], "one row"), whole[1:2], "values of row 1 by itself")
        cut = total // 3 + 1
        parts = [t for t in (tokens[:, :cut], tokens[:, cut:]) if t.shape[1]]
        s.agree(
            torch.cat([_values(s, module, t, "a piece") for t in parts], 1), whole, "values of pieces against the whole"
        )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(length)).to(s.device)
        s.agree(_values(s, module, tokens[:, order], "permuted tokens"), whole[:, order], "values of permuted tokens")
        s.agree(_values(s, module, tokens, "a batch, again"), whole, "values of the same tokens again")


def places_go_by_the_index(s: ModalitySubject) -> None:
    """Places of any index are those of the whole at that index; a modality without places has none for any index."""
    module = s.module(torch.float64)
    for length in LENGTHS:
        total = _tokens(s, module, length)[0].shape[1]
        whole = _places(s, module, None, total, "None")
        draw = torch.Generator().manual_seed(length)
        for batch, size in ((1, total), (3, total), (3, 1), (2, 2 * total + 1)):
            index = torch.randint(total, (batch, size), generator=draw).to(s.device)
            if (batch, size) == (1, total):
                index = torch.arange(total, device=s.device)[None]
            found = _places(s, module, index, size, f"index {tuple(index.shape)}")
            if found is None or whole is None:
                if found is not whole:
                    s.fail(f"places(None, {total}) is {_said(whole)}, places(index, {size}) is {_said(found)}")
                continue
            if whole.ndim != 3 or whole.shape[1:] != (total, s.dim):
                s.fail(f"places(None, {total}) must be (1, {total}, {s.dim}), is {tuple(whole.shape)}")
            if tuple(found.shape) != (batch, size, s.dim):
                s.fail(f"places(index {(batch, size)}) must be {(batch, size, s.dim)}, is {tuple(found.shape)}")
            s.finite(found, "places")
            s.agree(
                found,
                whole[:1].expand(batch, -1, -1)[torch.arange(batch)[:, None], index],
                "places(index) against places(None) there",
            )


def _said(places: Tensor | None) -> str:
    return "None" if places is None else str(tuple(places.shape))


def embedding_is_values_and_places(s: ModalitySubject) -> None:
    """``embed(tokens, layout) = values(tokens) + places(None)``, and with an index its places."""
    module = s.module(torch.float64)
    for length in LENGTHS:
        tokens, layout = _tokens(s, module, length)
        values, total = _values(s, module, tokens, "a batch"), tokens.shape[1]
        flipped = torch.arange(total, device=s.device).flip(0).expand(3, -1)
        for what, index in (("no index", None), ("an index", flipped)):
            places = _places(s, module, index, total, what)
            with s.running(f"embed with {what}"), torch.no_grad():
                found = module.embed(tokens, layout, index)
            s.agree(found, values if places is None else values + places, f"embed with {what}: values and places")


def gradients_reach_every_parameter(s: ModalitySubject) -> None:
    """Each parameter that trains has a gradient that is finite and not all zero."""
    module = s.module(torch.float64, fresh=True)
    tokens, layout = _tokens(s, module, LENGTHS[-1])
    with s.running("embed with a gradient"):
        x = module.embed(tokens, layout)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if x.requires_grad:
            (x * weights.to(s.device)).sum().backward()
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        if not bool(gradient.any()):
            s.fail(f"no gradient reaches parameter {name} {tuple(p.shape)}")
        s.finite(gradient, f"gradient of {name}")


def float64_is_closer(s: ModalitySubject) -> None:
    """``module.double()`` encodes the same, and embeds the same but for rounding."""
    single, double = s.module(), s.module(torch.float64)
    for length in LENGTHS:
        tokens, layout = _tokens(s, single, length)
        found, _ = _tokens(s, double, length)
        s.agree(found, tokens, "tokens of the module in float64", tol=1e-6)
        with torch.no_grad(), s.running("embed in float64"):
            x, y = single.embed(tokens, layout), double.embed(tokens, layout)
        if any(p.is_floating_point() for p in double.parameters()) and y.dtype != torch.float64:
            s.fail(f"the module in float64 embeds in {y.dtype}")
        s.agree(y, x.double(), "embedding in float64 against float32", tol=1e-5)


def state_dict_restores(s: ModalitySubject) -> None:
    """Weights saved as safetensors and loaded into a fresh module give the same tokens, raw data and vectors; a deep copy shares nothing."""
    module = s.module(fresh=True)
    given = s.uneven(module, 3, LENGTHS[1])
    tokens, layout = s.encode(module, given, "an example")
    raw = s.decode(module, tokens, layout, "an example")
    with torch.no_grad():
        x = module.embed(tokens, layout)
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            s.fail(f"{name} in the state_dict is {type(value).__name__}, which safetensors cannot hold: tensors only")
    fresh = s.build(seed=1)
    with s.running("weights through safetensors into a fresh module"):
        fresh.load_state_dict(
            {k: v.to(s.device) for k, v in load(save({k: v.contiguous() for k, v in state.items()})).items()}
        )
    with s.running("deepcopy"):
        twin = copy.deepcopy(module)
    for who, other in (("a fresh module with the weights loaded", fresh), ("a deep copy", twin)):
        found, place = s.encode(other, given, who)
        s.agree(found, tokens, f"tokens of {who}", tol=0.0)
        s.agree(s.decode(other, tokens, place, who), raw, f"raw decoded by {who}", tol=0.0)
        with torch.no_grad(), s.running(f"embed of {who}"):
            s.agree(other.embed(tokens, layout), x, f"embedding of {who}")
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        s.agree(module.embed(tokens, layout), x, "embedding of the original after its deep copy was changed")
