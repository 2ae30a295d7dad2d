"""The discretised mixture of logistics against torch.distributions, and as a probability."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import Uniform
from torch.distributions.transformed_distribution import TransformedDistribution
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from mmlong.heads import GREEDY, LogisticMixtureHead, Sampling
from mmlong.layout import Layout


def head(channels: int = 1, levels: int = 256, mixtures: int = 3) -> LogisticMixtureHead:
    torch.manual_seed(0)
    return LogisticMixtureHead(5, channels=channels, levels=levels, mixtures=mixtures).double()


def grid(levels: int) -> torch.Tensor:
    return torch.linspace(-1, 1, levels, dtype=torch.float64)


def logistic(mean: torch.Tensor, scale: torch.Tensor) -> TransformedDistribution:
    # torch's own recipe for a logistic: a uniform through the inverse sigmoid, then an affine map.
    base = Uniform(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    return TransformedDistribution(base, [SigmoidTransform().inv, AffineTransform(mean, scale)])


def test_probabilities_are_the_masses_of_torchs_logistics() -> None:
    levels, mixtures = 17, 3
    module = head(levels=levels, mixtures=mixtures)
    prediction = torch.randn(1, 1, 3 * mixtures, dtype=torch.float64)
    logits, means, scales = prediction.view(3, mixtures)
    values, half = grid(levels), 1 / (levels - 1)
    wanted = torch.zeros(levels, dtype=torch.float64)
    for k in range(mixtures):
        cdf = logistic(means[k], scales[k].exp()).cdf
        upper = torch.where(values > 1 - half, 1.0, cdf(values + half))
        lower = torch.where(values < -1 + half, 0.0, cdf(values - half))
        wanted += logits.softmax(0)[k] * (upper - lower)
    found = module.log_probability(prediction.expand(1, levels, -1), values.view(1, levels, 1)).exp()
    torch.testing.assert_close(found[0], wanted)


@pytest.mark.parametrize(("channels", "levels"), [(1, 256), (1, 65536), (2, 7), (3, 4)])
def test_all_tokens_together_have_probability_one(channels: int, levels: int) -> None:
    module = head(channels, levels)
    tokens = torch.tensor(list(itertools.product(grid(levels).tolist(), repeat=channels)), dtype=torch.float64)
    prediction = torch.randn(1, 1, module.linear.out_features, dtype=torch.float64)
    chance = module.log_probability(prediction.expand(1, len(tokens), -1), tokens[None]).exp()
    assert float(chance.sum()) == pytest.approx(1, abs=1e-9)


def test_narrow_and_far_logistics_stay_finite_in_float32() -> None:
    module = LogisticMixtureHead(5, mixtures=1)
    prediction = torch.tensor([[[0.0, 1.0, -40.0], [0.0, -30.0, -9.0], [0.0, 0.0, 30.0]]], requires_grad=True)
    loss, _ = module.loss(prediction, torch.tensor([[[-1.0], [1.0], [0.0]]]))
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_gradient() -> None:
    module = head(channels=3, levels=9, mixtures=2)
    prediction = torch.randn(2, 3, module.linear.out_features, dtype=torch.float64, requires_grad=True)
    target = grid(9)[torch.randint(9, (2, 3, 3))]
    assert torch.autograd.gradcheck(lambda p: module.loss(p, target)[0], (prediction,))


def test_padding_does_not_count() -> None:
    module = head(channels=2)
    x, target = torch.randn(2, 5, 5, dtype=torch.float64), torch.zeros(2, 5, 2, dtype=torch.float64)
    whole = [module.loss(module(x[i : i + 1, :n]), target[i : i + 1, :n]) for i, n in ((0, 5), (1, 3))]
    loss, count = module.loss(module(x), target, Layout(lengths=torch.tensor([5, 3])))
    torch.testing.assert_close(loss, whole[0][0] + whole[1][0])
    assert int(count) == 16


def test_samples_follow_the_probabilities_and_lie_on_levels() -> None:
    module = head(channels=2, levels=5, mixtures=2)
    one = torch.randn(1, 1, module.linear.out_features, dtype=torch.float64)
    drawn = module.sample(one.expand(1, 40_000, -1), Sampling(), torch.Generator().manual_seed(0))
    levels = ((drawn[0] + 1) * 2).round()
    torch.testing.assert_close(levels / 2 - 1, drawn[0])
    counts = torch.bincount((levels[:, 0] * 5 + levels[:, 1]).long(), minlength=25) / 40_000
    tokens = torch.tensor(list(itertools.product(grid(5).tolist(), repeat=2)), dtype=torch.float64)
    # Beyond the ends a sample is clamped to them, as the outermost bins reach to infinity.
    wanted = module.log_probability(one.expand(1, 25, -1), tokens[None]).exp()[0]
    torch.testing.assert_close(counts.double(), wanted, atol=0.012, rtol=0)


def test_greedy_is_the_likeliest_mean_and_filters_are_refused() -> None:
    module = head(mixtures=2)
    prediction = torch.tensor([[[0.0, 3.0, -0.5, 0.5, -2.0, -2.0]]], dtype=torch.float64)
    assert float(module.sample(prediction, GREEDY)) == pytest.approx(0.5, abs=1 / 255)
    with pytest.raises(ValueError, match="temperature only"):
        module.sample(prediction, Sampling(top_k=3))
