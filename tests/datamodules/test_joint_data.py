"""Pairs and mixes of datasets: partners of the same class, every sample once, shares as asked, and a resume that goes on to the bit."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from mmlong.datamodules.by_name import open_data
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.mixed import MixedDataModule
from mmlong.datamodules.mixing import count_steps, mix_shares, parts_of_epoch
from mmlong.datamodules.pack import pack_images
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.pairs import PairDataModule
from mmlong.datamodules.records import Record, SequenceSource
from mmlong.datamodules.sources import ImageSource, Item
from PIL import Image
from torch import nn

from mmlong.training.rng import RNGStateCallback

CLASSES = ("none", "one", "two")


def picture(number: int) -> Image.Image:
    """Its class is its brightness."""
    return Image.fromarray(np.full((4, 4), 80 * (number % 3) + number % 7, np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 to train on, 5 and 6 to evaluate."""
    items = [Item(f"{n}.png", {"label": n % 3}, partial(picture, n)) for n in range(37)]
    source = ImageSource("made", "made up", "none needed", {"label": CLASSES}, "label", items)
    out = tmp_path_factory.mktemp("pictures") / "packed"
    return pack_images(source, out, splits={"val": 5, "test": 6}, shard_bytes=9000).folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 to train on, 6 to evaluate, of the same classes in another order; the first byte is the class."""
    names = ("two", "none", "one")
    records = [
        Record(f"{n:02d}", partial(bytes, [n % 3] + [n] * (1 + n % 5)), {"kind": n % 3}, split="val" if n < 6 else None)
        for n in range(20)
    ]
    source = SequenceSource(
        "said", "text", "txt", {}, "made up", "none needed", records, labels={"kind": names}, default_label="kind"
    )
    out = tmp_path_factory.mktemp("texts") / "packed"
    return pack_sequences(source, out, splits={}, shard_bytes=4000).folder


def train_batches(data: Any, count: int) -> list[dict[str, Any]]:
    loader, found = data.train_dataloader(), []
    while len(found) < count:
        for batch in loader:
            found.append(batch)
            if len(found) == count:
                break
    return found


def test_words_of_classes(pictures: Path) -> None:
    data = PairDataModule(
        str(pictures), name="picture", partner_name="said", words=["zéro", "a", "two"], batch_size=5, seed=3
    )
    assert data.info() == {"modalities": {"picture": {"size": [4, 4], "channels": 1}, "said": {}}}
    seen = []
    for batch in train_batches(data, 5):
        part = batch["parts"]["said"]
        for label, row, length in zip(batch["label"].tolist(), part["raw"], part["lengths"].tolist(), strict=True):
            assert bytes(row[:length].tolist()).decode() == ["zéro", "a", "two"][label] + "\n"
            assert not row[length:].any()
        assert torch.equal(batch["parts"]["picture"]["raw"][:, 0, 0, 0] // 80, batch["label"].to(torch.uint8))
        seen += batch["index"].tolist()
    assert len(set(seen)) == 25  # each once; one in the tail
    with pytest.raises(ValueError, match="2 words for 3 classes: none, one, two"):
        PairDataModule(str(pictures), words=["a", "b"]).samples("train", True)


def test_partners_are_of_the_same_class(pictures: Path, texts: Path) -> None:
    """By name: the partner's classes stand in another order."""

    def made(seed: int = 3) -> PairDataModule:
        return PairDataModule(str(pictures), str(texts), batch_size=4, seed=seed, eval_batch_size=2)

    batches = train_batches(made(), 12)
    of_class = {0: 1, 1: 2, 2: 0}
    for batch in batches:
        said = batch["parts"]["text"]["raw"][:, 0].tolist()
        assert said == [of_class[label] for label in batch["label"].tolist()]
    again = train_batches(made(), 12)
    for a, b in zip(batches, again, strict=True):
        assert torch.equal(a["parts"]["text"]["raw"], b["parts"]["text"]["raw"])
    first = {int(i): bytes(r.tolist()) for b in batches[:6] for i, r in zip(b["index"], b["parts"]["text"]["raw"], strict=True)}  # fmt: skip
    second = {int(i): bytes(r.tolist()) for b in batches[6:] for i, r in zip(b["index"], b["parts"]["text"]["raw"], strict=True)}  # fmt: skip
    both = first.keys() & second.keys()
    assert any(first[i].rstrip(b"\0") != second[i].rstrip(b"\0") for i in both)  # another partner each epoch
    shown = [[b["parts"]["text"]["raw"].tolist() for b in made().val_dataloader()] for _ in range(2)]
    assert shown[0] == shown[1]
    assert sum(len(rows) for rows in shown[0]) == 5


def test_what_cannot_be_paired_is_told(pictures: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both are called image"):
        PairDataModule(str(pictures), str(pictures))
    with pytest.raises(ValueError, match="words are for partner: words"):
        PairDataModule(str(pictures), str(texts), words=["a"])
    with pytest.raises(ValueError, match="TextDataModule takes no size"):
        PairDataModule(str(pictures), str(texts), partner_options={"size": 3})
    with pytest.raises(ValueError, match="partner_options are of a dataset"):
        PairDataModule(str(pictures), partner_options={"size": 3})
    with pytest.raises(DataError, match="is not a packed dataset"):
        open_data(str(tmp_path))
    with pytest.raises(DataError, match="has splits train, val: split 'test'|split 'test'"):
        PairDataModule(str(pictures), str(texts)).samples("test", False)
    records = [Record(str(n), partial(bytes, [1, 2]), {"kind": 0}) for n in range(3)]
    less = SequenceSource("l", "text", "txt", {}, "", "", records, labels={"kind": ("one",)}, default_label="kind")
    pack_sequences(less, tmp_path / "less", splits={})
    with pytest.raises(ValueError, match="has no class none, two; it has one"):
        PairDataModule(str(pictures), str(tmp_path / "less")).samples("train", True)


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    extra=st.integers(0, 500),
    temperature=st.floats(0.3, 9),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_shares_and_turns(sizes: list[int], extra: int, temperature: float, epoch: int) -> None:
    named = {str(place): size for place, size in enumerate(sizes)}
    shares = mix_shares(named, temperature)
    assert shares.sum() == pytest.approx(1)
    wanted = np.array(sizes, float) ** (1 / temperature)
    np.testing.assert_allclose(shares, wanted / wanted.sum())
    steps = len(sizes) + extra
    counts = count_steps(steps, shares)
    assert sum(counts) == steps
    assert min(counts) >= 1
    assert all(abs(count - share * steps) < len(sizes) for count, share in zip(counts, shares, strict=True))
    turns = parts_of_epoch(counts, 5, epoch)
    assert np.bincount(turns, minlength=len(sizes)).tolist() == counts
    assert np.array_equal(turns, parts_of_epoch(counts, 5, epoch))


def test_bad_shares_are_told() -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        mix_shares({"a": 1}, 0)
    with pytest.raises(ValueError, match="a number above 0 of each of a, b"):
        mix_shares({"a": 1, "b": 2}, weights={"a": 1.0})
    with pytest.raises(ValueError, match="one of the two"):
        mix_shares({"a": 1}, 2, {"a": 1.0})
    with pytest.raises(ValueError, match="not one for each of 2"):
        count_steps(1, np.array([0.5, 0.5]))


def mixed(pictures: Path, texts: Path, **options: Any) -> MixedDataModule:
    parts = {"picture": {"dataset": str(pictures)}, "text": {"dataset": str(texts)}}
    return MixedDataModule(parts, **{"batch_size": 4, "seed": 2, **options})


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 4.0}, {"weights": {"picture": 1.0, "text": 3.0}}], ids=["size", "heat", "fixed"]
)
def test_every_sample_once_in_each_pass(pictures: Path, texts: Path, options: dict[str, Any]) -> None:
    """Whatever the shares: 6 batches of pictures are a pass over them, 3 of texts."""
    data = mixed(pictures, texts, **options)
    counts = data.counts(4)
    assert [own for own, _ in counts.values()] == [6, 3]
    steps = sum(n for _, n in counts.values())
    assert steps == len(data.train_dataloader()) == 9
    if "weights" in options:
        assert [n for _, n in counts.values()] == [2, 7]
    batches = train_batches(mixed(pictures, texts, **options), 4 * steps)
    whose = [next(iter(batch["parts"])) for batch in batches]
    assert all(len(batch["parts"]) == 1 for batch in batches)
    for epoch in range(4):
        here = Counter(whose[epoch * steps : (epoch + 1) * steps])
        assert [here[name] for name in counts] == [n for _, n in counts.values()]
    for name, (own, _) in counts.items():
        mine = [batch["index"].tolist() for kind, batch in zip(whose, batches, strict=True) if kind == name]
        for first in range(0, len(mine) - own + 1, own):
            ids = [sample for batch in mine[first : first + own] for sample in batch]
            assert len(set(ids)) == len(ids)
        everything = [sample for batch in mine for sample in batch]
        assert set(everything) <= set(range(26) if name == "picture" else range(26, 40))


def test_ranks_share_the_global_batch(pictures: Path, texts: Path) -> None:
    whole = train_batches(mixed(pictures, texts), 18)
    each = []
    for rank in range(2):
        data = mixed(pictures, texts, batch_size=2)
        data._ranks = lambda rank=rank: (rank, 2)  # type: ignore[method-assign]
        each.append(train_batches(data, 18))
    for a, *two in zip(whole, *each, strict=True):
        assert a["index"].tolist() == [sample for batch in two for sample in batch["index"].tolist()]


def test_evaluation_counts_every_sample_once(pictures: Path, texts: Path) -> None:
    data = mixed(pictures, texts, eval_batch_size=4)
    found = {"picture": 0, "text": 0}
    crossed = 0
    for batch in data.val_dataloader():
        crossed += len(batch["parts"]) == 2
        for name, part in batch["parts"].items():
            rows = part.get("rows", torch.arange(len(batch["index"])))
            assert len(rows) == len(part["raw"])
            found[name] += int(batch["weight"][rows].sum())
    assert found == {"picture": 5, "text": 6}
    assert crossed == 1  # the batch where one ends and the other begins has rows of both
    tested = [len(batch["index"]) for batch in data.test_dataloader()]
    assert sum(tested) == 6


class Net(pl.LightningModule):
    """Dropout and an optimiser with state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(batch["index"].tolist()))
        raw = [part["raw"].flatten(1).float() / 255 for part in batch["parts"].values()]
        features = torch.stack([each[:, :2].mean(1) for each in raw] + [torch.ones(len(raw[0]))] * (4 - len(raw)), 1)
        return self.net(features).square().mean()

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def run(data: Any, root: Path, checkpoint: Path | None = None) -> Net:
    pl.seed_everything(3 if checkpoint is None else 99)
    net = Net()
    saves = [ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)]
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[RNGStateCallback(), *(saves if checkpoint is None else [])], logger=False,
        enable_checkpointing=checkpoint is None, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, max_epochs=3, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(net, data, ckpt_path=checkpoint, weights_only=True)
    return net


@pytest.mark.parametrize("kind", ["pairs", "mixed"])
@pytest.mark.filterwarnings("ignore")
def test_resume_from_any_step_is_bitwise(kind: str, pictures: Path, texts: Path, tmp_path: Path) -> None:
    def data() -> Any:
        if kind == "mixed":
            return mixed(pictures, texts, temperature=3.0)
        return PairDataModule(str(pictures), str(texts), batch_size=4, seed=3)

    whole = run(data(), tmp_path / "runs")
    assert len(whole.seen) == 3 * (9 if kind == "mixed" else 6)
    checkpoints = sorted((tmp_path / "runs").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    for path in checkpoints[::5]:
        done = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        resumed = run(data(), tmp_path / "resumed", path)
        assert resumed.seen == whole.seen[done:], path.name
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (path.name, name)


def test_other_settings_are_refused_inside_an_epoch(pictures: Path, texts: Path) -> None:
    data = mixed(pictures, texts)
    train_batches(data, 2)
    saved = data.state_dict()
    assert saved["samples_done"] == 8
    other = mixed(pictures, texts, temperature=2.0)
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"data.parts was .* temperature 1.0 .* is .* temperature 2.0"):
        other.train_dataloader()
