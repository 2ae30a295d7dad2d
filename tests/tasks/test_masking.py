from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.tasks.masking import HIDDEN, KEPT, REPLACED, Masking, draw_fates, replacements


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(fate: torch.Tensor) -> list[int]:
    """Lengths of stretches of chosen tokens."""
    return [len(list(group)) for chosen, group in itertools.groupby((fate > 0).tolist()) if chosen]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 200), st.floats(0.01, 1), st.integers(1, 20), st.sampled_from(["geometric", "fixed"]),
    st.integers(0, 99),
)  # fmt: skip
def test_the_share_is_met_exactly_in_whole_spans(length: int, share: float, span: int, lengths: str, seed: int) -> None:
    masking = Masking(share=share, span=span, lengths=lengths, hide=0.5, replace=0.3)  # type: ignore[arg-type]
    fate = masking.draw(length, generator(seed))
    assert fate.shape == (length,)
    budget = min(max(round(share * length), 1), length) if length else 0
    assert int((fate > 0).sum()) == budget
    assert torch.equal(fate, masking.draw(length, generator(seed))), "a pure function of the generator"
    if lengths == "fixed":
        cut = [n for n in runs(fate) if n % span]
        assert len(cut) <= 1, "spans that touch are whole ones end to end, and one is cut"


def test_single_tokens_are_every_subset_alike() -> None:
    masking = Masking(share=0.4)
    draw = generator(0)
    seen = Counter(tuple(torch.nonzero(masking.draw(5, draw)).flatten().tolist()) for _ in range(4000))
    assert set(seen) == set(itertools.combinations(range(5), 2))
    assert all(abs(n - 400) < 5 * 400**0.5 for n in seen.values()), seen


def test_spans_have_the_mean_length_and_the_fates_their_shares() -> None:
    masking = Masking(share=0.1, span=4.0)
    fate = masking.draw(400_000, generator(1))
    found = runs(fate)
    # Spans touch now and then: at a share of 0.1 and a mean of 4, one in 37 follows another at once.
    assert sum(found) / len(found) == pytest.approx(4 * (1 + 0.1 / 4), rel=0.03)
    assert max(found) > 12, "geometric lengths have a long tail"
    for value, share in ((HIDDEN, 0.8), (REPLACED, 0.1), (KEPT, 0.1)):
        assert float((fate == value).sum() / (fate > 0).sum()) == pytest.approx(share, abs=0.015)
    starts = torch.stack([Masking(share=0.2, span=3).draw(20, generator(n)) > 0 for n in range(4000)]).float().mean(0)
    assert float(starts.min()) > 0.08, "both ends are reached (less often: a span does not wrap round)"
    assert float(starts.max()) < 0.25
    torch.testing.assert_close(starts, starts.flip(0), rtol=0.0, atol=0.04)


def _spans(masking: Masking) -> list[tuple[int, int]]:
    fate, at, found = masking.draw(1000, generator(3)), 0, []
    for chosen, group in itertools.groupby(fate.tolist()):
        n = len(list(group))
        if chosen:
            found.append((at, n))
        at += n
    return found


def test_a_span_meets_one_fate() -> None:
    masking = Masking(share=0.05, span=5, lengths="fixed", hide=0.4, replace=0.3)
    assert all(n % 5 == 0 for _, n in _spans(masking)), "each stretch of one fate is so many whole spans"


def test_rows_are_drawn_each_from_its_own_generator_within_its_length() -> None:
    masking = Masking(share=0.5)
    fates = draw_fates(masking, [7, 0, 3], 9, [generator(n) for n in range(3)])
    assert torch.equal(fates[0, :7], masking.draw(7, generator(0)))
    assert torch.equal(fates[2, :3], masking.draw(3, generator(2)))
    assert not fates[0, 7:].any()
    assert not fates[1].any()
    assert not fates[2, 3:].any()


def test_replacements_are_codes_or_tokens_of_the_same_row() -> None:
    codes = replacements(torch.zeros(2, 3000, dtype=torch.int64), [3000, 10], 5, [generator(0)] * 2)
    assert codes.dtype == torch.int64
    assert set(codes.flatten().tolist()) == set(range(5))
    real = torch.arange(40.0).view(2, 10, 2)
    other = replacements(real, [10, 4], None, [generator(0), generator(1)])
    assert other.shape == real.shape
    assert {tuple(v) for v in other[1].tolist()} <= {tuple(v) for v in real[1, :4].tolist()}, "valid ones only"
    assert replacements(real, [0, 0], None, [generator(0)] * 2).shape == real.shape


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.0}, "masking.share is 0.0"),
        ({"share": 1.2}, "masking.share is 1.2"),
        ({"span": 0.5}, "masking.span is 0.5"),
        ({"span": 2.5, "lengths": "fixed"}, "whole where lengths are fixed"),
        ({"lengths": "poisson"}, "geometric or fixed"),
        ({"hide": 0.9, "replace": 0.2}, "add up to at most 1"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Masking(**options)  # type: ignore[arg-type]
