"""Pairs: apart as they were put together, padding changes nothing, and towers that are learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmlong.backbone import BackboneConfig
from mmlong.estimate.step import synthetic_batch
from mmlong.tasks import MatchTask
from mmlong.tasks.match import apart

TEXTS = st.lists(
    st.tuples(st.binary(min_size=1, max_size=9), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
)


def together(pairs: list[tuple[bytes, bytes]], room: int = 0) -> dict[str, torch.Tensor]:
    rows = [a + b for a, b in pairs]
    raw = torch.full((len(rows), max(map(len, rows)) + room), 7, dtype=torch.uint8)
    for place, row in zip(raw, rows, strict=True):
        place[: len(row)] = torch.tensor(list(row), dtype=torch.uint8)
    sizes = torch.tensor([[len(a), len(b)] for a, b in pairs])
    return {"raw": raw, "lengths": sizes.sum(1), "second_at": sizes[:, 0]}


@given(TEXTS, st.integers(0, 3))
def test_apart_is_the_inverse(pairs: list[tuple[bytes, bytes]], room: int) -> None:
    batch = together(pairs, room)
    raw, lengths = apart(batch["raw"], batch["lengths"], batch["second_at"])
    assert raw.dtype == torch.uint8
    flat = [text for pair in pairs for text in pair]
    assert lengths.tolist() == [len(text) for text in flat]
    for row, text in zip(raw, flat, strict=True):
        assert bytes(row[: len(text)].tolist()) == text
        assert not row[len(text) :].any()


def task() -> MatchTask:
    torch.manual_seed(0)
    return MatchTask(
        {"name": "text"}, BackboneConfig(dim=16, depth=2, mixers=["min_gru"], direction="alternate"), {"num_classes": 2}
    )


def test_a_pair_is_read_by_itself_whatever_is_beside_it() -> None:
    model = task().eval()
    pairs = [(b"abc", b"defghij"), (b"k", b"lmnop"), (b"qrstuvwx", b"y")]
    whole, _ = model.predicted({**together(pairs), "label": torch.zeros(3, dtype=torch.int64)})
    for row, pair in enumerate(pairs):
        one, _ = model.predicted({**together([pair]), "label": torch.zeros(1, dtype=torch.int64)})
        torch.testing.assert_close(one[0], whole[row], rtol=1e-4, atol=1e-5)


def test_a_batch_of_drawn_pairs_trains() -> None:
    model = task()
    batch = synthetic_batch(model, 3, 8)
    assert batch["raw"].shape == (3, 16)
    prediction, target = model.predicted(batch)
    assert prediction.shape == (3, 2)
    model.loss(prediction, target, model.counted(batch)).backward()
    assert all(p.grad is not None for p in model.model.parameters())
    assert model.tokens_in(batch) == int(batch["lengths"].sum())


def test_what_is_no_pair_is_told() -> None:
    with pytest.raises(ValueError, match="second_at"):
        task().encode({"raw": torch.zeros(2, 5, dtype=torch.uint8)})
