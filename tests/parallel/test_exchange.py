"""States as messages, without a network: any tree, any types, nothing executed."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmlong.layout import Layout
from mmlong.mixers import state_tensors
from mmlong.parallel import piece_bounds, take_piece
from mmlong.parallel.exchange import build_state, form_of, pack, specs_of, unpack
from mmlong.parallel.loss import seed_of


class Pair(NamedTuple):
    left: object
    right: object


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(
        st.sampled_from(
            [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
        )
    )
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 9
    t = values.to(dtype)
    return t.transpose(0, -1) if t.ndim > 1 and draw(st.booleans()) else t


trees = st.recursive(
    st.one_of(st.none(), tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.tuples(inner, inner).map(lambda two: Pair(*two)),
    ),
    max_leaves=6,
)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@given(trees)
def test_a_message_brings_the_state(state: object) -> None:
    form = json.loads(json.dumps(form_of(state)))
    specs = specs_of(form)
    message = pack(state_tensors(state), torch.device("cpu"))
    assert message.dtype == torch.uint8
    assert equal(build_state(form, iter(unpack(message, specs))), state)


@pytest.mark.parametrize("name", ["system", "environ", "nothing", "PathLike.register"])
def test_only_named_tuples_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"os\..*no named tuple"):
        build_state({"named": ["os", name, []]}, iter(()))


@given(st.integers(1, 40), st.integers(1, 9))
def test_pieces_make_up_the_sequence(length: int, size: int) -> None:
    bounds = [piece_bounds(length, size, rank) for rank in range(size)]
    assert [position for start, stop in bounds for position in range(start, stop)] == list(range(length))
    assert max(stop - start for start, stop in bounds) == -(-length // size)
    x = torch.arange(length)[None]
    layout = Layout(lengths=torch.tensor([length // 2]))
    taken = [take_piece([x], layout, size, rank) for rank in range(size)]
    assert torch.equal(torch.cat([inputs[0] for inputs, _ in taken], 1), x)
    assert sum(int(piece.lengths) for _, piece in taken) == length // 2


def test_seeds_differ() -> None:
    seeds = {seed_of(seed, row, at) for seed in (0, 1, 2**61) for row in range(8) for at in range(0, 4096, 64)}
    assert len(seeds) == 3 * 8 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
