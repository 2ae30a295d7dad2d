"""Heads: what padding may not change, and the losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmlong.heads import create_head
from mmlong.heads.pooling import POOLS, AttentionPool, create_pool
from mmlong.layout import Layout
from mmlong.mixers.set_transformer import MAB


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_ignores_padding(pool: str) -> None:
    torch.manual_seed(0)
    head = create_head("classify", 8, num_classes=3, pool=pool)
    x = torch.randn(2, 9, 8)
    x[1, 5:] = 1e6
    padded = head(x, Layout(lengths=torch.tensor([9, 5])))
    torch.testing.assert_close(padded[0], head(x[:1])[0])
    torch.testing.assert_close(padded[1], head(x[1:, :5])[0])


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_of_nothing_is_zero_and_padding_may_be_anything(pool: str) -> None:
    head = create_head("classify", 8, num_classes=3, pool=pool)
    x = torch.randn(3, 5, 8)
    x[1], x[2, 2:] = torch.inf, torch.nan
    x.requires_grad_()
    pooled = head.pooled(x, Layout(lengths=torch.tensor([5, 0, 2])))
    assert pooled.isfinite().all()
    assert not pooled[1].any()
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    assert not gradient[1].any()
    assert not gradient[2, 2:].any()


def test_pooling_of_the_ends_takes_each_rows_own() -> None:
    x = torch.randn(3, 6, 8)
    layout = Layout(lengths=torch.tensor([6, 2, 1]))
    assert torch.equal(create_pool("first", 8)(x, layout), x[:, 0])
    assert torch.equal(create_pool("first", 8)(x), x[:, 0])
    assert torch.equal(create_pool("last", 8)(x, layout), torch.stack([x[0, 5], x[1, 1], x[2, 0]]))
    assert torch.equal(create_pool("last", 8)(x), x[:, -1])


@pytest.mark.parametrize(("dim", "heads"), [(16, 8), (12, 4), (6, 2), (7, 1)])
def test_attention_pooling_is_softmax_over_valid_positions(dim: int, heads: int) -> None:
    torch.manual_seed(0)
    pool = AttentionPool(dim).double()
    x, lengths = torch.randn(3, 9, dim, dtype=torch.float64), [9, 4, 1]
    found = pool(x, Layout(lengths=torch.tensor(lengths)))
    assert pool.heads == heads
    width = dim // heads
    for row, length in enumerate(lengths):
        keys, values = pool.key(x[row, :length]), pool.value(x[row, :length])
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            weights = torch.softmax(keys[:, part] @ pool.query[part] / math.sqrt(width), 0)
            torch.testing.assert_close(found[row, part], weights @ values[:, part])


def _norm(x: torch.Tensor, p: torch.nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + p.eps).sqrt() * p.weight + p.bias


def _mab(m: MAB, x: torch.Tensor, y: torch.Tensor, heads: int) -> torch.Tensor:
    """``MAB(x (k, D), y (L, D))`` of the paper, by torch's own attention layer."""
    a = m.attend
    read, _ = F.multi_head_attention_forward(
        x[:, None], y[:, None], y[:, None], x.shape[1], heads, None, None, None, None, False, 0.0,
        a.out_proj.weight, None, use_separate_proj_weight=True, q_proj_weight=a.q_proj.weight,
        k_proj_weight=a.k_proj.weight, v_proj_weight=a.v_proj.weight,
    )  # fmt: skip
    z = _norm(x + read[:, 0], m.norm_attention)
    return _norm(z + (z @ m.feedforward.weight.T + m.feedforward.bias).clamp_min(0), m.norm_feedforward)


@pytest.mark.parametrize(("seeds", "heads"), [(1, 4), (3, 2)])
def test_pma_is_the_papers_formula(seeds: int, heads: int) -> None:
    torch.manual_seed(0)
    head = create_head("classify", 12, num_classes=5, pool={"name": "pma", "seeds": seeds, "heads": heads}).double()
    pool = head.pool
    with torch.no_grad():
        for p in pool.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, lengths = torch.randn(3, 63, 12, dtype=torch.float64), [63, 17, 1]
    found = head.pooled(x, Layout(lengths=torch.tensor(lengths)))
    assert found.shape == (3, seeds * 12)
    assert head(x).shape == (3, 5)
    for row, length in enumerate(lengths):
        keys = (x[row, :length] @ pool.feedforward.weight.T + pool.feedforward.bias).clamp_min(0)
        want = _mab(pool.gather, pool.seeds, keys, heads)
        if seeds > 1:
            want = _mab(pool.between, want, want, heads)
        torch.testing.assert_close(found[row], want.flatten())
    # A set has no order.
    torch.testing.assert_close(head(x.flip(1)), head(x))


def test_pma_reads_as_isab_pytorch_does() -> None:
    code = pytest.importorskip("isab_pytorch.isab_pytorch")
    torch.manual_seed(0)
    pool = create_pool({"name": "pma", "seeds": 4, "heads": 3}, 24).double()
    mine, theirs = pool.gather.attend, code.Attention(24, heads=3, dim_head=8).double()
    weights = {
        "to_q.weight": mine.q_proj.weight,
        "to_kv.weight": torch.cat([mine.k_proj.weight, mine.v_proj.weight]),
        "to_out.weight": mine.out_proj.weight,
    }
    x, valid = torch.randn(2, 31, 24, dtype=torch.float64), torch.arange(31) < torch.tensor([31, 13])[:, None]
    seeds = pool.seeds.expand(2, -1, -1)
    want = torch.func.functional_call(theirs, weights, (seeds, x), {"mask": valid})
    torch.testing.assert_close(mine(seeds, x, valid), want)


def test_what_is_no_pooling() -> None:
    for pool, message in (
        ("sum", "unknown pooling 'sum'"),
        ({"name": "pma", "seeds": 0}, "at least 1 seed"),
        ({"name": "pma", "heads": 3}, "divide its width 8"),
        ({"name": "pma", "seed": 2}, "did you mean 'seeds'"),
        ({"name": "mean", "seeds": 2}, "pooling mean has no option 'seeds'"),
    ):
        with pytest.raises(ValueError, match=message):
            create_head("classify", 8, num_classes=3, pool=pool)
    with pytest.raises(ValueError, match="reads positions by their order"):
        create_head("both_strands", 8, num_classes=3, pool={"name": "last"})
    assert create_head("project", 8, pool={"name": "pma", "seeds": 2})(torch.randn(2, 5, 8)).shape == (2, 128)


def test_multilabel_loss_by_hand() -> None:
    head = create_head("multilabel", 4, num_classes=3)
    x, target = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[1.0, 0, 1], [0, 0, 0.25]])
    p = 1 / (1 + torch.exp(-x))
    loss, count = head.loss(x, target)
    torch.testing.assert_close(loss, -(target * p.log() + (1 - target) * (1 - p).log()).sum())
    assert float(count) == 6
    with pytest.raises(ValueError, match=r"multilabel has targets \(2, 3\), got \(2,\)"):
        head.loss(x, torch.tensor([0, 1]))


def test_regression_losses_by_hand() -> None:
    x, target = torch.tensor([[0.0, 3.0], [1.0, -2.0]], dtype=torch.float64), torch.tensor([[0.5, 1.0], [1.0, 2.0]])
    e = [0.5, 2.0, 0.0, 4.0]
    expected = {
        "mse": sum(v * v for v in e),
        "l1": sum(e),
        "huber": sum(v * v / 2 if v <= 1.5 else 1.5 * (v - 0.75) for v in e),
    }
    for error, value in expected.items():
        head = create_head("regress", 4, num_classes=2, error=error, delta=1.5)
        loss, count = head.loss(x, target)
        assert float(loss) == pytest.approx(value)
        assert float(count) == 4
        per_token = create_head("regress_tokens", 4, num_classes=2, error=error, delta=1.5)
        padded = torch.cat([x[None], torch.full((1, 2, 2), torch.nan, dtype=torch.float64)])
        loss, count = per_token.loss(padded, target.expand(2, -1, -1), Layout(lengths=torch.tensor([2, 0])))
        assert (float(loss), float(count)) == (pytest.approx(value), 4)
    with pytest.raises(ValueError, match=r"regress has targets \(2, 2\), got \(2,\)"):
        head.loss(x, target[:, 0])
    with pytest.raises(ValueError, match=r"regress_tokens has targets \(1, 2, 2\), got \(1, 2\)"):
        per_token.loss(x[None], target[None, :, 0])


def test_tags_count_where_there_are_any() -> None:
    torch.manual_seed(0)
    head = create_head("tag", 4, num_classes=5)
    logits, target = torch.randn(2, 6, 5, dtype=torch.float64), torch.randint(5, (2, 6))
    target[0, 1], target[0, 4], target[1, 3:] = -100, -100, -100
    layout = Layout(lengths=torch.tensor([5, 6]))
    kept = [(b, t) for b, t in [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]]
    expected = -sum(F.log_softmax(logits, -1)[b, t, target[b, t]] for b, t in kept)
    loss, count = head.loss(logits, target, layout)
    torch.testing.assert_close(loss, expected)
    assert float(count) == 6
    assert float(head.loss(logits, target)[1]) == 7
    with pytest.raises(ValueError, match=r"tag has targets \(2, 6\), got \(2, 12\)"):
        head.loss(logits, target.repeat(1, 2))


@pytest.mark.parametrize("name", ["multilabel", "regress", "tag", "regress_tokens"])
def test_shapes_of_predictions(name: str) -> None:
    head = create_head(name, 8, num_classes=3)
    prediction = head(torch.randn(2, 5, 8), Layout(lengths=torch.tensor([5, 3])))
    assert prediction.shape == ((2, 5, 3) if head.per_token else (2, 3))


def test_classify_loss_is_a_sum_of_nats() -> None:
    head = create_head("classify", 4, num_classes=4)
    loss, count = head.loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert float(loss) == pytest.approx(3 * math.log(4))
    assert float(count) == 3


def test_categorical_loss_counts_valid_positions_only() -> None:
    head = create_head("categorical", 4, num_classes=8)
    logits, target = torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.long)
    logits[1, 2:] = torch.nan
    loss, count = head.loss(logits, target, Layout(lengths=torch.tensor([5, 2])))
    assert float(count) == 7
    assert float(loss) == pytest.approx(7 * math.log(8), rel=1e-6)


def test_readout_reads_each_position_by_itself_and_refuses_other_lengths() -> None:
    torch.manual_seed(0)
    head = create_head("readout", 4, num_classes=2, tokens=6, width=3)
    x = torch.randn(2, 6, 4)
    assert not torch.allclose(head(x), head(x.flip(1)))
    with pytest.raises(ValueError, match="exactly 6 tokens, got 5 tokens"):
        head(x[:, :5])
    with pytest.raises(ValueError, match="padded rows"):
        head(x, Layout(lengths=torch.tensor([6, 5])))


def test_unknown_options_and_names() -> None:
    with pytest.raises(ValueError, match="unknown pooling 'sum'"):
        create_head("classify", 4, num_classes=2, pool="sum")
    with pytest.raises(ValueError, match="unknown error 'mae'; known: mse, l1, huber"):
        create_head("regress", 4, error="mae")
    with pytest.raises(ValueError, match="above 0, got 0"):
        create_head("regress_tokens", 4, error="huber", delta=0)
    with pytest.raises(KeyError, match="did you mean 'classify'"):
        create_head("clasify", 4)
    with pytest.raises(TypeError, match="did you mean 'num_classes'"):
        create_head("classify", 4, num_class=2)


def test_a_tied_and_capped_head_behind_a_transform() -> None:
    torch.manual_seed(0)
    head = create_head(
        "categorical", 8, num_classes=5, tied=True, softcap=3.0, transform="gelu", norm_eps=1e-3
    ).double()
    x, table = torch.randn(2, 4, 8, dtype=torch.float64), torch.nn.Embedding(6, 8).double()
    with pytest.raises(ValueError, match="a tied head has no weights of its own"):
        head(x)
    head.tie(table)
    assert sorted(head.state_dict()) == ["dense.bias", "dense.weight", "linear.bias", "norm.bias", "norm.weight"]
    u = F.layer_norm(F.gelu(head.dense(x)), (8,), head.norm.weight, head.norm.bias, 1e-3)
    torch.testing.assert_close(head(x), 3 * torch.tanh((u @ table.weight[:5].T + head.linear.bias) / 3))
    head(x).sum().backward()
    assert table.weight.grad is not None
    for wrong, found in (
        (None, "none"),
        (torch.nn.Embedding(6, 4), "one of 6 rows of 4"),
        (torch.nn.Embedding(4, 8), "one of 4 rows"),
    ):
        with pytest.raises(ValueError, match=f"at least 5 codes of width 8; it has {found}"):
            head.tie(wrong)
    with pytest.raises(ValueError, match="softcap must be positive"):
        create_head("categorical", 8, num_classes=5, softcap=0)
