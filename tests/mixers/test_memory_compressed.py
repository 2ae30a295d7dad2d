"""Memory-compressed attention against its package, what is not whole blocks against the formula, and which blocks are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mmlong.mixers import create_mixer
from mmlong.mixers.memory_compressed import blocks_over


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer("memory_compressed", 24, **{"heads": 3, **options}).double()
    with torch.no_grad():
        m.null_k.normal_()
        m.null_v.normal_()
    return m


def as_a_convolution(m: Any, conv: Any) -> Tensor:
    """Weights ``(out, in of a group, taps)``."""
    groups, _, width = conv.weight.shape
    return conv.weight.view(groups, m.factor, width, width).permute(0, 3, 2, 1).reshape(groups * width, width, m.factor)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "factor"), [(300, 3), (20, 4), (3, 3)])
@pytest.mark.oracle("memory-compressed-attention: MemoryCompressedAttention", "memory_compressed")
def test_against_the_package(same_as: Any, causal: bool, length: int, factor: int) -> None:
    """Theirs has one kernel for keys and values, and divides scores by the root of the whole width."""
    code = pytest.importorskip("memory_compressed_attention")
    m = build(causal=causal, factor=factor, grouped=True)
    m.v_conv = m.k_conv
    theirs = code.MemoryCompressedAttention(24, heads=3, causal=causal, compression_factor=factor).double()
    weights = {
        "to_qkv.weight": torch.cat([3**0.5 * m.q_proj.weight, m.k_proj.weight, m.v_proj.weight]),
        "to_out.weight": m.out_proj.weight,
        "to_out.bias": torch.zeros(24, dtype=torch.float64),
        "compress_fn.conv.weight": as_a_convolution(m, m.k_conv),
        "compress_fn.conv.bias": m.k_conv.bias,
        "null_k": m.null_k[None, None],
        "null_v": m.null_v[None, None],
    }
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    y, _ = m(x)
    same_as(m, x, (y, None), (functional_call(theirs, weights, (x,)), None))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.oracle("definition: dense, masked", "memory_compressed")
def test_against_the_formula(same_as: Any, causal: bool, grouped: bool) -> None:
    T = 290  # of which two are in no block
    m = build(causal=causal, grouped=grouped)
    x = torch.randn(2, T, 24, dtype=torch.float64, requires_grad=True)
    short = torch.cat([x, x.new_zeros(2, 1, 24)], 1)
    keys = []
    for proj, conv, null in ((m.k_proj, m.k_conv, m.null_k), (m.v_proj, m.v_conv, m.null_v)):
        made = torch.nn.functional.conv1d(
            proj(short).mT, as_a_convolution(m, conv), conv.bias, stride=3, groups=3 if grouped else 1
        )
        keys.append(torch.cat([null.expand(2, 1, 24), made.mT], 1))
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (m.q_proj(x), *keys))
    scores = q @ k.mT / 8**0.5
    if causal:
        ends = torch.cat([torch.tensor([-1]), torch.arange(2, T + 1, 3)])
        scores = scores.masked_fill(ends > torch.arange(T)[:, None], -torch.inf)
    y = m.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    same_as(m, x, (m(x)[0], None), (y, None))


def test_blocks_that_are_over_are_seen() -> None:
    for past, length, factor in ((0, 1, 3), (0, 700, 3), (5, 300, 3), (1000, 130, 2), (7, 260, 1)):
        total = 1 + (past + length) // factor
        seen = blocks_over(past, length, factor, torch.device("cpu")).mask(length, total)[0, 0]
        own = torch.arange(past, past + length)[:, None]
        key = torch.arange(total)
        assert torch.equal(seen, (key == 0) | (factor * key - 1 <= own)), (past, length, factor)


def test_state_is_a_third_of_the_keys_and_an_open_block() -> None:
    m = build()
    _, state = m(torch.randn(2, 11, 24, dtype=torch.float64))
    assert {key: tuple(t.shape) for key, t in state.items()} == {
        "open": (2, 2, 24), "k": (2, 3, 3, 8), "v": (2, 3, 3, 8), "seen": (2, 11, 0),
    }  # fmt: skip
    assert m.state_bytes(11) == 4 * (2 * 24 + 2 * 3 * 24)


def test_first_tokens_see_the_learned_key_alone() -> None:
    m = build()
    y, _ = m(torch.randn(2, 2, 24, dtype=torch.float64))
    torch.testing.assert_close(y, m.out_proj(m.null_v).expand_as(y))


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="memory_compressed: factor must be at least 1, got 0"):
        build(factor=0)
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        build(heads=5)
