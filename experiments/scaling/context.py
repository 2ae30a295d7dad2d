"""What a model makes of its past: bits a token at position ``t`` of a document, and bits of the same tokens given ``n`` tokens before them.

Both stream: a document is read in pieces with the state carried, so memory does not grow with the position. The second has the same targets whatever the length of the past, so that nothing but the past tells two lengths apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from mmlong.generation import evaluating
from mmlong.layout import Layout
from mmlong.models import AutoregressiveModel

PIECE = 4096


def bits_between(model: AutoregressiveModel, tokens: Tensor, edges: Sequence[int], piece: int = PIECE) -> list[tuple[float, int]]:  # fmt: skip
    """Bits, and numbers of raw data, of the tokens between each two edges, of a document read from its first token.

    Args:
        model: the model; left in the mode it was in.
        tokens: ``(1, L, ...)``.
        edges: rising positions; what lies before the first is read and not counted, what lies behind the last is not read.
        piece: tokens run at a time.

    Raises:
        ValueError: edges that do not rise from 0 to at most L.
    """
    marks = list(edges)
    if len(marks) < 2 or marks[0] < 0 or marks[-1] > tokens.shape[1] or marks != sorted(set(marks)):
        raise ValueError(f"edges rise, from 0 or more to {tokens.shape[1]} at most; got {marks}")
    found = [(0.0, 0)] * (len(marks) - 1)
    state = None
    with evaluating(model):
        for start in range(0, marks[-1], piece):
            here = tokens[:, start : min(start + piece, marks[-1])]
            end = start + here.shape[1]
            prediction, state = model(here, state, Layout())
            for place, (low, high) in enumerate(itertools.pairwise(marks)):
                first, last = max(low, start) - start, min(high, end) - start
                if first < last:
                    nats, count = model.head.loss(prediction[:, first:last], here[:, first:last])
                    found[place] = (found[place][0] + float(nats) / math.log(2), found[place][1] + int(count))
    return found


def bits_at(
    model: AutoregressiveModel, documents: Iterable[Tensor], edges: Sequence[int], piece: int = PIECE
) -> list[float | None]:
    """Bits a number at positions between edges, over all documents as far as each reaches; ``None`` where none does."""
    bits, numbers = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for tokens in documents:
        marks = [min(edge, tokens.shape[1]) for edge in edges]
        marks = sorted(set(marks))
        if len(marks) < 2:
            continue
        for place, (nats, count) in enumerate(bits_between(model, tokens, marks, piece)):
            bits[place] += nats
            numbers[place] += count
    return [b / n if n else None for b, n in zip(bits, numbers, strict=True)]


def stretches(lengths: Sequence[int], before: int, width: int, count: int) -> list[tuple[int, int]]:
    """``count`` stretches of ``width`` tokens with at least ``before`` tokens in front of them in their document: (document, first token), evenly over all places there are, none over another.

    Raises:
        ValueError: fewer places than that.
    """
    places = [
        (document, before + width * number)
        for document, length in enumerate(lengths)
        for number in range(max(0, (length - before) // width))
    ]
    if len(places) < count:
        raise ValueError(
            f"{count} stretches of {width} tokens behind {before:,} were asked for, and the documents have {len(places)}: ask for fewer, or for a shorter past"
        )
    return [places[number * len(places) // count] for number in range(count)]


def bits_given(
    model: AutoregressiveModel, documents: Sequence[Tensor], targets: Sequence[tuple[int, int]], width: int, past: int,
    piece: int = PIECE,
) -> float:  # fmt: skip
    """Bits a number of the target stretches, each read behind the ``past`` tokens before it and nothing else."""
    bits, numbers = 0.0, 0
    for document, first in targets:
        tokens = documents[document][:, first - past : first + width]
        ((found, count),) = bits_between(model, tokens, [past, past + width], piece)
        bits, numbers = bits + found, numbers + count
    return bits / numbers
