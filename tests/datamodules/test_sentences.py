"""Sentences about samples: filled from what is packed, paired with their pictures, and told where they cannot be made."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules.errors import BadSampleError
from mmlong.datamodules.pack import pack_images
from mmlong.datamodules.pairs import PairDataModule
from mmlong.datamodules.sentences import Sentences, check_template, text_rows
from mmlong.datamodules.sources import ImageSource, Item
from PIL import Image

SENTENCE = "a {kind_name} one, {share:.0%} naïve"


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), number, np.uint8))


def packed(out: Path, labels: dict[str, tuple[str, ...]], lacking: int | None = None) -> Path:
    """20 pictures whose brightness is their number; one may lack a fact."""
    items = [
        Item(
            f"{n}.png",
            {name: n % 2 for name in labels},
            partial(picture, n),
            {} if n == lacking else {"share": n / 20},
        )
        for n in range(20)
    ]
    source = ImageSource("made", "made up", "none needed", labels, next(iter(labels), None), items)
    return pack_images(source, out, splits={"val": 4, "test": 4}).folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("pictures") / "packed", {"kind": ("plain", "odd")})


def said(batch: dict[str, Any], name: str = "text") -> list[str]:
    part = batch["parts"][name]
    for row, length in zip(part["raw"], part["lengths"].tolist(), strict=True):
        assert not row[length:].any()
    rows = zip(part["raw"], part["lengths"].tolist(), strict=True)
    return [bytes(row[:length].tolist()).decode() for row, length in rows]


def test_every_picture_has_its_own_sentence(pictures: Path) -> None:
    data = PairDataModule(str(pictures), sentence=SENTENCE, batch_size=5, eval_batch_size=3, seed=1)
    assert data.info() == {"modalities": {"image": {"size": [4, 4], "channels": 1}, "text": {}}}
    batches = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    seen = {}
    for batch in batches:
        for number, sentence, weight in zip(
            batch["parts"]["image"]["raw"][:, 0, 0, 0].tolist(), said(batch), batch["weight"].tolist(), strict=True
        ):
            assert sentence == f"a {('plain', 'odd')[number % 2]} one, {number / 20:.0%} naïve\n"
            if weight:
                seen[number] = seen.get(number, 0) + 1
    assert seen == dict.fromkeys(seen, 1)
    assert len(seen) >= 18  # a last batch that is not full is left for the next epoch
    assert "label" in batches[0]


def test_pictures_without_labels_have_sentences_too(tmp_path: Path) -> None:
    out = packed(tmp_path / "packed", {})
    batch = next(iter(PairDataModule(str(out), sentence="share {share}", batch_size=2).train_dataloader()))
    assert "label" not in batch
    for number, sentence in zip(batch["parts"]["image"]["raw"][:, 0, 0, 0].tolist(), said(batch), strict=True):
        assert sentence == f"share {number / 20}\n"


def test_a_sample_that_lacks_a_fact_is_told_or_skipped(tmp_path: Path) -> None:
    out = packed(tmp_path / "packed", {"kind": ("plain", "odd")}, lacking=7)
    with pytest.raises(BadSampleError, match="has no fact 'share' for the sentence"):
        for split in ("train", "val", "test"):
            samples = PairDataModule(str(out), sentence=SENTENCE).samples(split, False)
            samples.fetch([(0, place, 1.0) for place in range(len(samples))])
    skipped = 0
    for split in ("train", "val", "test"):
        samples = PairDataModule(str(out), sentence=SENTENCE, on_bad="skip").samples(split, False)
        batch, problems = samples.fetch([(0, place, 1.0) for place in range(len(samples))])
        bad = batch["parts"]["image"]["raw"][:, 0, 0, 0] == 7
        assert torch.equal(batch["weight"] == 0, bad)
        assert len(problems) == int(bad.sum())
        skipped += len(problems)
    assert skipped == 1
    wrong = PairDataModule(str(out), sentence="{kind_name:.0%}").samples("train", False)
    with pytest.raises(BadSampleError, match="does not fit the sentence"):
        wrong.fetch([(0, 0, 1.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentence": "no facts"}, "is the same for all"),
        ({"sentence": "{"}, "is no template"),
        ({"sentence": "{kind.__class__}"}, "asks for 'kind.__class__'"),
        ({"sentence": "{0}"}, "asks for '0'"),
        ({"sentence": "{kind}", "words": ["a", "b"]}, "in place of words"),
    ],
    ids=["none", "brace", "attribute", "number", "words"],
)
def test_what_is_no_sentence_is_told(options: dict[str, Any], message: str, pictures: Path) -> None:
    with pytest.raises(ValueError, match=message):
        PairDataModule(str(pictures), **options)


def test_changing_the_sentence_is_a_changed_setting(pictures: Path) -> None:
    one, two = (PairDataModule(str(pictures), sentence=text).fixed_settings() for text in ("{kind}", "{kind_name}"))
    assert one != two


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_rows_come_back(rows: list[bytes]) -> None:
    found = text_rows([np.frombuffer(row, np.uint8) for row in rows])
    assert found["raw"].shape == (len(rows), max(map(len, rows)))
    for row, raw, length in zip(rows, found["raw"], found["lengths"].tolist(), strict=True):
        assert bytes(raw[:length].tolist()) == row
        assert not raw[length:].any()


@given(st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_is_a_template_or_is_refused(text: str) -> None:
    try:
        names = check_template(text)
    except ValueError:
        return
    assert names
    assert all(name.isidentifier() for name in names)


def test_it_reads_what_is_packed(pictures: Path) -> None:
    split = PairDataModule(str(pictures)).lead.dataset.split("test")
    sentences = Sentences("{file} {kind}", split)
    for sample in range(len(split)):
        number = int(sentences.sentence(sample).decode().split(".")[0])
        assert sentences.sentence(sample) == f"{number}.png {number % 2}\n".encode()
