"""Pathfinder as data: drawn alike whoever asks, even, resumable; and the release's own files, read and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.pathfinder_data import PathfinderDataModule
from mmlong.datamodules.pathfinder_files import LEVELS, PathfinderFiles
from PIL import Image


def data(**options: Any) -> PathfinderDataModule:
    return PathfinderDataModule(
        **{"size": 32, "train_count": 12, "val_count": 4, "test_count": 6, "batch_size": 4, **options}
    )


def rows(loader: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """index, label and pixels of all batches, by index."""
    batches = list(loader)
    index = torch.cat([b["index"] for b in batches])
    order = index.argsort()
    return index[order], *(torch.cat([b[k] for b in batches])[order] for k in ("label", "raw"))


def test_batches() -> None:
    module = data()
    module.prepare_data()
    module.setup("fit")
    assert module.info() == {"modality": {"size": [32, 32], "channels": 1}, "num_classes": 2, "class_names": ["apart", "connected"]}  # fmt: skip
    index, label, raw = rows(module.train_dataloader())
    assert index.tolist() == list(range(12))
    assert label.sum() == 6
    assert raw.shape == (12, 1, 32, 32)
    assert raw.dtype == torch.uint8
    assert module.class_counts.tolist() == [6, 6]
    val, test = rows(module.val_dataloader()), rows(module.test_dataloader())
    assert len(val[0]) == 4
    assert len(test[0]) == 6
    assert not any(torch.equal(a, b) for a in raw for b in (*val[2], *test[2])), "splits share no picture"


def test_whoever_asks_sees_the_same() -> None:
    """More workers, another batch size, more pictures in the split, another order of training: picture i is picture i."""
    first = rows(data().train_dataloader())
    for options in ({"num_workers": 2}, {"batch_size": 6, "seed": 3}, {"cache": True}):
        module = data(**options)
        again = rows(module.train_dataloader())
        module.teardown()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), options
    more = data(train_count=40).samples("train", True).fetch([(0, place, 1.0) for place in range(12)])[0]
    assert torch.equal(more["raw"], first[2])
    other = rows(data(picture_seed=1).train_dataloader())
    assert not torch.equal(other[2], first[2])


def test_a_position_is_kept() -> None:
    module = data()
    loader = module.train_dataloader()
    seen = [batch["index"] for _, batch in zip(range(2), loader, strict=False)]
    state = module.state_dict()
    rest = data()
    rest.load_state_dict(state)
    last = [batch["index"] for batch in rest.train_dataloader()]
    assert sorted(torch.cat([*seen, *last]).tolist()) == list(range(12))
    changed = data(parameters={"distractors": 1})
    changed.load_state_dict(state)
    with pytest.raises(ValueError, match="the bytes of"):
        changed.train_dataloader()


def test_shorter_paths_to_begin_with() -> None:
    images = data(train_count=600, train_paddles={9: 3, 6: 2}).dataset
    assert [(p.paddles, p.distractor_paddles) for p in images.lengths] == [(6, 2), (9, 3), (14, 4)]
    shown = [np.bincount([images.variant("train", epoch, place) for place in range(600)], minlength=3) for epoch in range(7)]  # fmt: skip
    assert [list(found > 0) for found in shown] == [[True, False, False]] * 2 + [[True, True, False]] * 3 + [[True] * 3] * 2  # fmt: skip
    for found, newest in ((shown[2], 1), (shown[6], 2)):
        assert 360 < found[newest] < 440, "two of three are of the newest length"
    assert list(shown[5]) != list(shown[6]), "other places in another epoch"
    again = data(train_count=600, train_paddles={6: 2, 9: 3}).dataset
    assert [again.variant("train", 6, n) for n in range(600)] == [images.variant("train", 6, n) for n in range(600)]
    assert images.variant("val", 9, 0) == 0
    assert images.drawn_by("val", 0).paddles == 14
    assert images.fingerprint == again.fingerprint != data(train_count=600).dataset.fingerprint


@pytest.mark.parametrize("cache", [False, True])
def test_each_epoch_shows_its_lengths(cache: bool) -> None:
    module = data(train_paddles={3: 1, 4: 1}, cache=cache)
    samples = module.samples("train", True)
    for epoch in (0, 1, 2, 0):
        batch = samples.fetch([(epoch, place, 1.0) for place in range(12)])[0]
        for place in range(12):
            variant = module.dataset.variant("train", epoch, place)
            assert torch.equal(batch["raw"][place], torch.from_numpy(module.dataset.image("train", place, variant)))
    assert not np.array_equal(module.dataset.image("train", 0, 0), module.dataset.image("train", 0, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 100}, "sizes 32, 64"), ({"level": "mean"}, "level is"), ({"parameters": {"padles": 3}}, "no parameter 'padles'"),
        ({"parameters": {"size": 64}}, "no parameter 'size'"), ({"level": "easy"}, "of the release's pictures"),
        ({"source_path": "x", "train_paddles": {6: 1}}, "has some already"), ({"train_count": 0}, "at least 1"), ({"train_paddles": {2: 1}}, "lengths from 3 to 13"),
        ({"train_paddles": {14: 1}}, "got 14: 1"), ({"train_paddles": {6: 0}}, "got 6: 0"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        data(**options)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release of 20 pictures in two batches, one of them empty."""
    level = tmp_path / "lra_release" / "pathfinder32" / LEVELS["hard"]
    (level / "metadata").mkdir(parents=True)
    for batch in (2, 10):
        (level / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for number in range(10):
            name = f"sample_{number}.png"
            pixels = np.full((32, 32), 10 * batch + number, np.uint8)
            Image.fromarray(pixels).save(level / "imgs" / str(batch) / name)
            lines.append(f"imgs/{batch} {name} {number} {number % 2} 1.0 14 4 2 0.5 1 1")
        (level / "metadata" / f"{batch}.npy").write_text("\n".join(lines) + "\n")
    (level / "imgs/2/sample_3.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    "below", ["", "lra_release", "lra_release/pathfinder32", f"lra_release/pathfinder32/{LEVELS['hard']}"]
)
def test_the_release(release: Path, below: str) -> None:
    module = data(source_path=str(release / below))
    module.setup("fit")
    assert [len(module.dataset.split(name)) for name in ("train", "val", "test")] == [15, 2, 2]
    batch = module.samples("train", False).fetch([(0, place, 1.0) for place in range(15)])[0]
    shown = [20, 21, 22, *range(24, 30), *range(100, 106)]
    assert batch["raw"][:, 0, 0, 0].tolist() == shown, "batch 2 before batch 10, the empty picture left out"
    assert batch["label"].tolist() == [value % 2 for value in shown]


def test_the_release_when_it_is_wrong(release: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures of Pathfinder"):
        PathfinderFiles(release, 64, "hard")
    level = release / "lra_release" / "pathfinder32" / LEVELS["hard"]
    metadata = level / "metadata" / "2.npy"
    kept = metadata.read_text()

    def refused(content: bytes, said: str) -> None:
        metadata.write_bytes(content)
        with pytest.raises(DataError, match=said):
            PathfinderFiles(release, 32, "hard")

    np.save(tmp_path / "real.npy", np.array([["imgs/2", 1]], dtype=object), allow_pickle=True)
    refused((tmp_path / "real.npy").read_bytes(), "may hold code")
    refused(b"imgs/2 sample_0.png 0\n", "folder, file, number and label")
    refused(b"imgs/2 sample_0.png 0 2\n", "label")
    refused(b"imgs/2 ../../x.png 0 1\n", "outside of its folder")
    refused(b"imgs/2 gone.png 0 1\n", "listed in the metadata and missing")
    metadata.write_text(kept)
    (level / "imgs/2/sample_0.png").write_bytes(b"no picture")
    with pytest.raises(BadSampleError, match=r"sample_0\.png"):
        PathfinderFiles(release, 32, "hard").image("train", 0)
    skipping = data(source_path=str(release), on_bad="skip")
    batch, problems = skipping.samples("train", True).fetch([(0, 0, 1.0), (0, 1, 1.0)])
    assert batch["weight"].tolist() == [0, 1]
    assert len(problems) == 1
