"""Reformer against reformer-pytorch's and transformers' LSH attention, rotations handed over; its causal form against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.mixers.reformer import MOST, buckets_for, hashes_of
from mmlong.ops.selection import inverse_of, order_by


def build(dim: int = 24, **options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer("reformer", dim, **{"heads": 3, "chunk": 8, **options}).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(3)  # scores that matter
    return m


def heads(m: Any, t: Tensor) -> Tensor:
    return t.unflatten(-1, (m.heads, -1)).transpose(1, 2)


def tokens(m: Any, batch: int, length: int) -> Tensor:
    x = torch.randn(batch, length, m.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


@pytest.mark.parametrize(("length", "rounds"), [(64, 1), (64, 4), (160, 3)])
@pytest.mark.oracle("reformer-pytorch: LSHAttention", "reformer")
def test_against_reformer_pytorch(same_as: Any, length: int, rounds: int) -> None:
    """With what the paper has and its default leaves out: pairs of one bucket only, each weighed down by how often it is found."""
    code = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    m = build(causal=False, rounds=rounds, buckets=length // 8)
    x = tokens(m, 2, length)
    attend = code.LSHAttention(
        bucket_size=8, n_hashes=rounds, allow_duplicate_attention=False, attend_across_buckets=False
    ).eval()
    torch.manual_seed(5)
    drawn = torch.randn(1, m.head_dim, rounds, length // 16, dtype=torch.float64)
    m.rotations[0, ..., : length // 16] = drawn
    torch.manual_seed(5)
    qk, v = (heads(m, p(x)) for p in (m.qk_proj, m.v_proj))
    y, _, _ = attend(qk.flatten(0, 1), v.flatten(0, 1))
    y = m.out_proj(y.view(2, 3, length, -1).transpose(1, 2).flatten(2))
    same_as(m, x, m(x), (y, None), 1e-7)  # their 1e-9 beside each count


@pytest.mark.parametrize(("buckets", "rounds"), [(16, 1), (16, 3), (256, 2)])
@pytest.mark.oracle("transformers: LSHSelfAttention", "reformer")
def test_across_buckets_against_transformers(same_as: Any, buckets: int, rounds: int) -> None:
    """But for the first chunk of a round, which theirs lets see the last one of another."""
    code = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    m = build(causal=False, rounds=rounds, buckets=buckets, across_buckets=True, scale=1.0)
    length, d = 160, m.head_dim
    x = tokens(m, 2, length)
    config = code.ReformerConfig(
        hidden_size=m.dim, num_attention_heads=3, attention_head_size=d, lsh_attn_chunk_length=8, num_hashes=rounds,
        num_buckets=hashes_of(buckets) if buckets > 128 else buckets, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
        hash_seed=5, is_decoder=False, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = code.LSHSelfAttention(config).double().eval()
    with torch.no_grad():
        theirs.query_key.weight.copy_(m.qk_proj.weight)
        theirs.value.weight.copy_(m.v_proj.weight)
    theirs.query_key, theirs.value = m.qk_proj, m.v_proj
    sizes = [n // 2 for n in hashes_of(buckets)]
    torch.manual_seed(5)
    drawn = torch.randn(3, d, rounds, sum(sizes), dtype=torch.float64)
    for n, part in enumerate(drawn.split(sizes, -1)):
        m.rotations[n, ..., : sizes[n]] = part
    found = theirs(x)
    place = inverse_of(order_by(m.hash(heads(m, m.qk_proj(x)), buckets)), length)
    kept = (place >= 8).all(0).all(1)[..., None]  # in no round and no head in the first chunk
    assert int(kept.sum()) > length // 2
    same_as(m, x, (m(x)[0] * kept, None), (m.out_proj(found.hidden_states) * kept, None), 1e-5)


@pytest.mark.parametrize("length", [1, 9, 100])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.oracle("definition: counting back", "reformer")
def test_causal_against_the_definition(same_as: Any, length: int, rounds: int) -> None:
    m = build(rounds=rounds, chunk=4, buckets=6)
    x = tokens(m, 2, length)
    q, v = (heads(m, p(x)) for p in (m.qk_proj, m.v_proj))
    k = q / q.norm(dim=-1, keepdim=True)
    turned = torch.einsum("bhsd,hdrc->rbhsc", k, m.rotations[0])
    bucket = torch.cat([turned, -turned], -1).argmax(-1)
    rows = []
    for i in range(length):
        # One list of keys for each row and head.
        seen = torch.zeros(2, 3, length, dtype=torch.bool)
        for r, b, h in torch.cartesian_prod(torch.arange(rounds), torch.arange(2), torch.arange(3)).tolist():
            same = [j for j in range(i) if bucket[r, b, h, j] == bucket[r, b, h, i]]
            seen[b, h, same[-4:]] = True
        seen[..., i] = ~seen.any(-1)
        scores = (q[:, :, i, None] * k).sum(-1) / m.head_dim**0.5
        rows.append((scores.masked_fill(~seen, -torch.inf).softmax(-1)[..., None] * v).sum(-2))
    y = m.out_proj(torch.stack(rows, 2).transpose(1, 2).flatten(2))
    found, state = m(x)
    assert torch.equal(state["buckets"].long(), bucket.permute(1, 2, 3, 0))
    same_as(m, x, (found, {"k": state["k"], "v": state["v"]}), (y, {"k": k, "v": v}))


def test_rotations_are_drawn_in_training_and_kept_in_eval() -> None:
    m = build(causal=False)
    x = tokens(m, 1, 70)
    assert torch.equal(m(x)[0], m(x)[0])
    m.train()
    assert not torch.equal(m(x)[0], m(x)[0])


def test_rotations_are_a_seeds_or_torchs() -> None:
    a, b, c, d, e = (create_mixer("reformer", 24, seed=seed).rotations for seed in (0, 0, 1, None, None))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(d, e)


def test_causal_rotations_stay_in_training() -> None:
    """A piece must find its past in the buckets where it was put."""
    m = build(rounds=2, chunk=4, buckets=6).train()
    x = tokens(m, 2, 60)
    whole, _ = m(x)
    _, state = m(x[:, :33])
    torch.testing.assert_close(m(x[:, 33:], state)[0], whole[:, 33:])


def test_how_many_buckets() -> None:
    assert [buckets_for(n, 64) for n in (1, 64, 1024, 65536, 1 << 24)] == [2, 2, 32, 2048, MOST]
    assert [hashes_of(n) for n in (2, 128, 256, 2048)] == [[2], [128], [16, 16], [32, 64]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 7}, "buckets must be even"),
        ({"buckets": 134}, "two hashes"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"across_buckets": True}, "two-sided only"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Reformer: .*{message}"):
        create_mixer("reformer", 16, **options)
