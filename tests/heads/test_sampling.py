"""Drawing codes: filters against transformers' own, the draws against the probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mmlong.heads import Sampling
from mmlong.heads.sampling import draw_codes, filter_logits, uniform

IDS: torch.LongTensor = torch.zeros(1, 1, dtype=torch.long)  # type: ignore[assignment]


@pytest.mark.parametrize("n", [5, 63, 256])
def test_filters_are_transformers_filters(n: int) -> None:
    logits = torch.randn(7, n, generator=torch.Generator().manual_seed(n)) * 3
    k = min(4, n)
    for sampling, warper in (
        (Sampling(top_k=k), TopKLogitsWarper(k)),
        (Sampling(top_p=0.8), TopPLogitsWarper(0.8)),
        (Sampling(min_p=0.1), MinPLogitsWarper(0.1)),
    ):
        found = filter_logits(logits, sampling)
        assert torch.equal(found.isinf(), warper(IDS, logits.clone()).isinf())  # type: ignore[arg-type]
        assert not found.isinf().all(-1).any()


def test_everything_but_the_likeliest_can_be_kept_out() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0), Sampling(temperature=0.0)):
        assert draw_codes(logits, sampling, torch.Generator().manual_seed(1)).tolist() == [1]


def test_draws_follow_the_probabilities_and_the_generator() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = draw_codes(logits.expand(50_000, 4), Sampling(temperature=0.7), torch.Generator().manual_seed(0))
    shares = torch.bincount(draws, minlength=4) / 50_000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), atol=0.01, rtol=0)
    again = draw_codes(logits.expand(50_000, 4), Sampling(temperature=0.7), torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)


@pytest.mark.parametrize("extreme", ["largest", "least"])
def test_no_draw_is_0_or_1(extreme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 codes and 65,536 tokens one draw in 2^24 comes once a picture: it must not decide against the logits, nor choose what is filtered out."""
    real = torch.randint

    def drawn(high: int, shape: Any, **options: Any) -> torch.Tensor:
        return torch.full_like(real(high, shape, **options), high - 1 if extreme == "largest" else 0)

    monkeypatch.setattr(torch, "randint", drawn)
    numbers = uniform(torch.zeros(3), None)
    assert ((numbers > 0) & (numbers < 1)).all()
    logits = torch.tensor([[0.0, 40.0, 3.0, 1.0]])
    assert draw_codes(logits, Sampling(), None).tolist() == [1]
    assert draw_codes(logits, Sampling(top_k=2), None).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
    ],
)
def test_senseless_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
