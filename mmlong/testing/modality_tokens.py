"""Encoding and decoding: tokens as declared, the raw tensor back, rows and documents by themselves, and what is refused."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality
from mmlong.testing.modality_subject import LENGTHS, ModalitySubject, Raw
from mmlong.testing.verdicts import short

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
ERRORS = (TypeError, ValueError)


def tokens_are_as_declared(s: ModalitySubject) -> None:
    """Integer codes within ``codes``, or finite real vectors of ``channels`` numbers; a layout that fits them; twice the same."""
    module = s.module()
    for batch in (1, 3):
        for length in LENGTHS:
            what = f"batch {batch}, length {length}"
            given = s.uneven(module, batch, length, marks=True)
            before = [None if t is None else t.clone() for t in given]
            tokens, layout = s.encode(module, given, what)
            for name, was, now in zip(("raw", "lengths", "resets"), before, given, strict=True):
                if was is not None and now is not None and not torch.equal(was, now):
                    s.fail(f"{what}: encode changed {name} in place")
            if module.codes is None:
                _real(s, module, tokens, what)
            else:
                _integer(s, module, tokens, what)
            if tokens.shape[0] != batch:
                s.fail(f"{what}: {tokens.shape[0]} rows of tokens for {batch} of raw data")
            fixed = module.tokens_per_sample()
            if fixed is not None and tokens.shape[1] != fixed:
                s.fail(f"{what}: {tokens.shape[1]} tokens, tokens_per_sample() says {fixed}")
            counted = module.count_tokens(given[0], given[1])
            there = batch * tokens.shape[1] if layout.lengths is None else int(layout.lengths.sum())
            # A layout without the lengths that were given is found elsewhere.
            if (given[1] is None) == (layout.lengths is None) and counted != there:
                s.fail(f"{what}: count_tokens() says {counted}, there are {there} (tokens_per_step, tokens_per_sample)")
            with s.running(f"{what}: the layout against the tokens"):
                layout.check(batch, tokens.shape[1])
            if layout.lengths is not None and not bool(
                ((layout.lengths >= 0) & (layout.lengths <= tokens.shape[1])).all()
            ):
                s.fail(f"{what}: layout.lengths {layout.lengths.tolist()} of {tokens.shape[1]} tokens")
            for name in ("lengths", "resets", "positions"):
                there = getattr(layout, name)
                if there is not None and there.device != tokens.device:
                    s.fail(f"{what}: layout.{name} is on {there.device}, tokens on {tokens.device}")
            if tokens.device.type != s.device.type:
                s.fail(f"{what}: tokens are on {tokens.device}, raw on {s.device}")
            again, _ = s.encode(module, given, what)
            s.agree(again, tokens, f"{what}: encoded again", tol=0.0)


def _integer(s: ModalitySubject, module: Modality, tokens: Tensor, what: str) -> None:
    if tokens.dtype != torch.int64 or tokens.ndim != 2:
        s.fail(
            f"{what}: with codes = {module.codes} tokens must be int64 (B, L), are {tokens.dtype} {tuple(tokens.shape)}"
        )
    wrong = ((tokens < 0) | (tokens >= (module.codes or 0))).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        s.fail(
            f"{what}: code {int(tokens[row, place])} at row {row}, position {place} is outside 0 .. {(module.codes or 0) - 1} "
            "(padding is embedded too)"
        )


def _real(s: ModalitySubject, module: Modality, tokens: Tensor, what: str) -> None:
    if not tokens.is_floating_point() or tokens.ndim != 3 or tokens.shape[2] != module.channels:
        s.fail(
            f"{what}: with codes = None and channels = {module.channels} tokens must be real (B, L, {module.channels}), "
            f"are {tokens.dtype} {tuple(tokens.shape)}"
        )
    s.finite(tokens, f"{what}: tokens")


def decode_gives_the_raw_back(s: ModalitySubject) -> None:
    """The same raw tensor, or within ``quantisation(raw)``; what was decoded once encodes to the same tokens."""
    module = s.module()
    for batch in (1, 3):
        for length in LENGTHS:
            what = f"batch {batch}, length {length}"
            given = s.uneven(module, batch, length, marks=True)
            raw, lengths, resets = given
            tokens, layout = s.encode(module, given, what)
            found = s.decode(module, tokens, layout, what)
            if found.dtype != raw.dtype or found.shape != raw.shape:
                s.fail(
                    f"{what}: decode gives {short(found.dtype)} {tuple(found.shape)}, the raw tensor was "
                    f"{short(raw.dtype)} {tuple(raw.shape)}"
                )
            valid = s.valid(Layout(lengths=lengths), raw.shape[-1], batch)
            valid = valid.view(batch, *[1] * (raw.ndim - 2), -1).expand_as(raw) if lengths is not None else raw == raw
            was, now = (_sorted(t, lengths) for t in (raw, found)) if module.unordered else (raw, found)
            _close(s, now, was, valid, module.quantisation(was), f"{what}: decode(encode(raw)) against raw")
            again, _ = s.encode(module, (torch.where(valid, found, raw), lengths, resets), f"{what}, decoded once")
            kept = s.valid(layout, tokens.shape[1], batch).view(*tokens.shape[:2], *[1] * (tokens.ndim - 2))
            s.agree(again.where(kept, 0), tokens.where(kept, 0), f"{what}: tokens of what was decoded", tol=0.0)


def _sorted(raw: Tensor, lengths: Tensor | None) -> Tensor:
    """``raw (B, ..., T)`` with what is valid of each row in the order of its numbers, the first foremost."""
    rows = []
    for row, length in zip(raw, [raw.shape[-1]] * len(raw) if lengths is None else lengths.tolist(), strict=True):
        columns = row.reshape(-1, raw.shape[-1])[:, :length].T.tolist()
        order = torch.tensor(sorted(range(length), key=columns.__getitem__), dtype=torch.long, device=raw.device)
        rows.append(torch.cat([row[..., order], row[..., length:]], -1))
    return torch.stack(rows)


def order_of_a_set_changes_nothing(s: ModalitySubject) -> None:
    """What is valid of a row, in any order: the very same tokens and layout."""
    module = s.module()
    for length in LENGTHS:
        raw, lengths, _ = s.uneven(module, 3, length)
        # Some alike, so that what is done about equal ones shows.
        total = raw.shape[-1]
        raw[..., total // 2] = raw[..., 0]
        tokens, layout = s.encode(module, (raw, lengths, None), f"length {length}")
        for seed in range(3):
            draw, mixed = torch.Generator().manual_seed(seed), raw.clone()
            for row, valid in enumerate([total] * 3 if lengths is None else lengths.tolist()):
                order = torch.randperm(valid, generator=draw).to(s.device)
                mixed[row, ..., :valid] = raw[row][..., order]
            found, place = s.encode(module, (mixed, lengths, None), f"length {length}, in another order")
            s.agree(found, tokens, f"length {length}: tokens of the set in another order", tol=0.0)
            for name in ("lengths", "positions"):
                there, here = getattr(place, name), getattr(layout, name)
                if (there is None) != (here is None) or (here is not None and not torch.equal(there, here)):
                    s.fail(f"length {length}: layout.{name} of the set in another order is another")


def _close(s: ModalitySubject, found: Tensor, raw: Tensor, valid: Tensor, allowed: Tensor | float, what: str) -> None:
    off = (found.double() - raw.double()).abs()
    # A bound is a real number: rounding in its own arithmetic is no fault.
    limit = torch.as_tensor(allowed, dtype=torch.float64, device=raw.device) * (1 + 1e-6)
    wrong = valid & ~(off <= limit)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        s.fail(
            f"{what}: first wrong at index {list(at)}: {float(found[at]):.9g}, was {float(raw[at]):.9g} "
            f"(allowed {float(limit.expand_as(off)[at]):.3g}); worst difference {float(off[wrong].max()):.3g}; "
            f"{int(wrong.sum())} of {wrong.numel()} values"
        )


def grid_is_right(s: ModalitySubject) -> None:
    """Where there is a grid over the raw tensor's cells: another token at a position changes the raw tensor at that position's cell, and nowhere else."""
    module = s.module()
    given, other = s.uneven(module, 1, LENGTHS[1]), s.uneven(module, 1, LENGTHS[1], seed=1)
    tokens, layout = s.encode(module, given, "an example")
    others, _ = s.encode(module, other, "another example")
    raw = given[0]
    if layout.grid is None:
        return
    shapes = {raw.shape[2:]: "cells", (*raw.shape[2:], raw.shape[1]): "channel last", raw.shape[1:]: "all axes"}
    kind = shapes.get(layout.grid)
    if kind is None:
        return  # cells that the raw tensor does not have, e.g. blocks: only their number can be held against the tokens
    cells = layout.coordinates(tokens.shape[1])[0].tolist()
    for place, cell in enumerate(cells):
        changed = tokens.clone()
        changed[:, place] = others[:, place]
        differs = (
            s.decode(module, changed, layout, "one other token")[0] != s.decode(module, tokens, layout, "tokens")[0]
        )
        at = {"cells": (slice(None), *cell), "channel last": (cell[-1], *cell[:-1]), "all axes": tuple(cell)}[kind]
        here = bool(differs[at].any())
        differs[at] = False
        elsewhere = differs.nonzero()
        if len(elsewhere) or here == torch.equal(changed, tokens):
            said = f"changes index {elsewhere[0].tolist()}" if len(elsewhere) else "does not change it"
            s.fail(
                f"position {place} is at cell {cell} of the grid {layout.grid} by its layout; another token there {said}"
            )


def rows_are_encoded_alone(s: ModalitySubject) -> None:
    """A row of a batch has the tokens that it has by itself, cut to its own length."""
    module = s.module()
    for length in LENGTHS:
        given = s.uneven(module, 3, length)
        tokens, layout = s.encode(module, given, f"batch 3, length {length}")
        for row in range(3):
            _same_row(s, module, given, tokens, layout, row, f"batch 3, length {length}: row {row}")


def _same_row(
    s: ModalitySubject, module: Modality, given: Raw, tokens: Tensor, layout: Layout, row: int, what: str
) -> None:
    raw, lengths, _ = given
    part = raw[row : row + 1] if lengths is None else raw[row : row + 1, ..., : int(lengths[row])]
    alone, _ = s.encode(module, (part, None, None), f"{what} by itself")
    valid = tokens.shape[1] if layout.lengths is None else int(layout.lengths[row])
    if valid != alone.shape[1]:
        s.fail(f"{what}: its layout counts {valid} tokens in the batch, by itself it has {alone.shape[1]}")
    s.agree(tokens[row : row + 1, :valid], alone, f"{what} in the batch against by itself", tol=0.0)


def padding_changes_nothing(s: ModalitySubject) -> None:
    """What stands past a row's length changes no token, valid or not, and stays within the codes."""
    module = s.module()
    for length in LENGTHS:
        raw, lengths, _ = s.uneven(module, 3, length)
        assert lengths is not None
        tokens, layout = s.encode(module, (raw, lengths, None), f"length {length}")
        inside = s.valid(Layout(lengths=lengths), raw.shape[-1], 3).view(3, *[1] * (raw.ndim - 2), -1)
        other = s.uneven(module, 3, length, seed=1)[0]
        for what, filling in (("zeros", torch.zeros_like(raw)), ("other data", other)):
            found, _ = s.encode(module, (torch.where(inside, raw, filling), lengths, None), f"{what} as padding")
            s.agree(
                found, tokens, f"length {length}, lengths {lengths.tolist()}: tokens with {what} as padding", tol=0.0
            )
        others, _ = s.encode(module, (other, None, None), "other data")
        kept = s.valid(layout, tokens.shape[1], 3).view(*tokens.shape[:2], *[1] * (tokens.ndim - 2))
        found, expected = (
            s.decode(module, t, layout, f"length {length}, padded").where(inside, 0)
            for t in (torch.where(kept, tokens, others), tokens)
        )
        s.agree(found, expected, f"length {length}: raw decoded with other tokens as padding", tol=0.0)
        empty = torch.tensor([raw.shape[-1], 0, 1], device=s.device)
        tokens, layout = s.encode(module, (raw, empty, None), "an empty row")
        if layout.lengths is None or int(layout.lengths[1]) != 0:
            s.fail(f"length {length}: a row of length 0 has layout.lengths {layout.lengths}")


def documents_are_encoded_alone(s: ModalitySubject) -> None:
    """Documents packed in a row have the tokens that each has by itself, and the layout's resets are where they begin."""
    module = s.module()
    for length in LENGTHS:
        given = s.uneven(module, 3, length, marks=True)
        raw, lengths, resets = given
        assert resets is not None
        tokens, layout = s.encode(module, given, f"length {length}, with resets")
        for row in range(3):
            end = raw.shape[-1] if lengths is None else int(lengths[row])
            cuts = [*resets[row, :end].nonzero().flatten().tolist(), end]
            parts = [
                s.encode(module, (raw[row : row + 1, ..., a:b], None, None), "a document")[0]
                for a, b in itertools.pairwise(cuts)
            ]
            alone = torch.cat(parts, 1)
            what = f"length {length}: row {row}, documents from {cuts[:-1]}"
            s.agree(tokens[row : row + 1, : alone.shape[1]], alone, f"{what}: tokens against each alone", tol=0.0)
            if layout.resets is None:
                s.fail(f"{what}: the layout has no resets")
                continue
            begins = torch.tensor([0, *(p.shape[1] for p in parts[:-1])]).cumsum(0).tolist()
            found = layout.resets[row, : alone.shape[1]].nonzero().flatten().tolist()
            if found != begins:
                s.fail(f"{what}: documents begin at tokens {begins}, layout.resets are at {found}")


def what_is_outside_is_refused(s: ModalitySubject) -> None:
    """Another dtype or shape, lengths and resets that do not fit, and codes that there are not: an error that says what was expected."""
    module = s.module()
    raw, lengths, resets = s.uneven(module, 2, LENGTHS[1], marks=True)
    takes_lengths, takes_resets = s.takes(module)
    for dtype in DTYPES:
        if dtype != raw.dtype:
            other = raw.to(dtype)
            s.refuses(TypeError, lambda x=other: module.encode(x), f"raw of {short(dtype)}", says=short(raw.dtype))  # type: ignore[misc]
    shapes = [raw.flatten()[0], raw.flatten(), raw.view(*raw.shape, *[1] * (6 - raw.ndim)), raw[None]]
    shapes += [raw[0]] if raw.ndim > 2 else []
    if module.tokens_per_sample() is not None:
        shapes.append(torch.cat([raw, raw], -1))
    for other in shapes:
        _refused_or_right(s, module, other)
    T, B = raw.shape[-1], raw.shape[0]

    def bad(what: str, lengths: Tensor | None, resets: Tensor | None = None) -> None:
        moved = [None if t is None else t.to(s.device) for t in (lengths, resets)]
        s.refuses(ERRORS, lambda: module.encode(raw, *moved), what)

    full = torch.full((B,), T)
    marks = torch.zeros(B, T, dtype=torch.bool)
    if takes_lengths:
        bad("lengths that are not int64", full.float())
        bad("lengths of another batch", full[:1])
        bad("lengths beyond the raw tensor", full + 1)
        bad("negative lengths", full - T - 1)
    else:
        bad("lengths, which its example has none of", full)
    if takes_resets:
        bad("resets that are not bool", None, marks.long())
        bad("resets of another length", None, torch.cat([marks, marks], 1))
    else:
        bad("resets, which its example has none of", None, marks)
    tokens, layout = s.encode(module, (raw, lengths, resets), "an example")
    if module.codes is not None:
        for code in (-1, module.codes):
            wrong = tokens.clone()
            wrong[0, 0] = code
            s.refuses(ValueError, lambda t=wrong: module.decode(t, layout), f"code {code} to decode")  # type: ignore[misc]
    if module.tokens_per_sample() is not None:
        s.refuses(
            ValueError,
            lambda: module.decode(torch.cat([tokens, tokens], 1)),
            "tokens of two samples in one row to decode",
        )


def _refused_or_right(s: ModalitySubject, module: Modality, raw: Tensor) -> None:
    """Some shapes mean something to some modalities; then they come back."""
    what = f"raw of shape {tuple(raw.shape)}"
    with s.running(f"given {what}, which must raise ValueError or come back from decode"):
        try:
            with torch.no_grad():
                tokens, layout = module.encode(raw)
                found = module.decode(tokens, layout)
        except ERRORS as error:
            if "(B" not in str(error):
                s.fail(
                    f"given {what}: the {type(error).__name__} must say which shape (B, ...) was expected; it says: {error}"
                )
            return
    if found.numel() != raw.numel() or (found.shape[0], found.shape[-1]) != (raw.shape[0], raw.shape[-1]):
        s.fail(f"accepted {what} and made {tuple(found.shape)} of it; must raise ValueError")
    everywhere = torch.ones_like(raw, dtype=torch.bool)
    _close(s, found.reshape(raw.shape), raw, everywhere, module.quantisation(raw), f"accepted {what}")
