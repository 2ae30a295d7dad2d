"""Joint training: bits of each modality, weights, orders, segments, what a batch has not, and what a test leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.tasks import JointTask
from mmlong.training.optim import OptimConfig

SIZE = [3, 4]
BOTH = [["picture", "words"], ["words", "picture"]]


def task(**options: Any) -> JointTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "modalities": {"picture": {"name": "image_bytes", "order": "raster"}, "words": {"name": "text"}},
        "backbone": BackboneConfig(dim=16, depth=2, mixers=["mamba2"]),
        "data_info": {"modalities": {"picture": {"size": SIZE, "channels": 1}, "words": {}}},
    }
    return JointTask(**{**settings, **options})


def batch(rows: int, weight: list[float] | None = None, seed: int = 1) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 2, 4, 1, 3][:rows])
    return {
        "parts": {
            "picture": {"raw": torch.randint(256, (rows, 1, *SIZE), dtype=torch.uint8, generator=draw)},
            "words": {"raw": torch.randint(256, (rows, 5), dtype=torch.uint8, generator=draw), "lengths": lengths},
        },
        "index": torch.arange(rows),
        "weight": torch.tensor(weight or [1.0] * rows),
    }


def one_by_one(module: JointTask, rows: dict[str, Any], order: list[str]) -> dict[str, list[float]]:
    """Nats of each row by itself, by modality."""
    found: dict[str, list[float]] = {"picture": [], "words": []}
    for row in range(len(rows["index"])):
        length = int(rows["parts"]["words"]["lengths"][row])
        raw = {
            "picture": rows["parts"]["picture"]["raw"][row : row + 1],
            "words": rows["parts"]["words"]["raw"][row : row + 1, :length],
        }
        spans, layout = module.joint.encode(raw, None, [order])
        prediction, _ = module.joint(spans, None, layout)
        for name, (nats, _) in module.joint.losses(prediction, spans).items():
            found[name].append(float(nats.detach()))
    return found


@pytest.mark.parametrize("order", BOTH, ids=["words last", "words first"])
def test_the_loss_is_the_bits_of_each_modality(order: list[str]) -> None:
    rows = batch(3)
    module = task(orders=[order]).double().eval()
    alone = one_by_one(module, rows, order)
    picture, words = sum(alone["picture"]), sum(alone["words"])
    loss, counted = module.loss(*module.encode(rows))
    assert counted["picture"].numbers == 3 * 12
    assert counted["words"].numbers == 5 + 2 + 4
    assert float(counted["words"].nats) == pytest.approx(words)
    assert float(counted["picture"].bits) == pytest.approx(picture / 36 / math.log(2))
    assert float(loss) == pytest.approx((picture + words) / 47 / math.log(2))
    weighted = task(orders=[order], weights={"words": 3}).double().eval()
    loss, _ = weighted.loss(*weighted.encode(rows))
    assert float(loss) == pytest.approx((picture / 36 + 3 * words / 11) / 4 / math.log(2))


def test_rows_of_no_weight_do_not_count() -> None:
    module = task().double().eval()
    rows = batch(3, [1.0, 0.0, 1.0])
    _, counted = module.loss(*module.encode(rows))
    alone = one_by_one(module, batch(3), ["picture", "words"])
    assert counted["words"].numbers == 9
    assert float(counted["words"].nats) == pytest.approx(alone["words"][0] + alone["words"][2])
    nothing, counted = module.loss(*module.encode(batch(2, [0.0, 0.0])))
    assert float(nothing) == 0
    assert counted["picture"].numbers == 0


@pytest.mark.parametrize(("picture", "mixers", "keep"), [("image_bytes", ["mamba2"], 1), ("image", ["attention", {"name": "local", "window": 3}], "sqrt")], ids=["codes", "numbers"])  # fmt: skip
@pytest.mark.parametrize("segment", [1, 5, 17, 100])
def test_segments_change_nothing(segment: int, picture: str, mixers: list[Any], keep: Any) -> None:
    """Loss, counts and gradients, of codes and of numbers with a linear prediction, wherever the border between spans lies."""
    rows = batch(3)
    options: dict[str, Any] = {
        "weights": {},
        "modalities": {"picture": {"name": picture, "order": "raster"}, "words": {"name": "text"}},
        "backbone": BackboneConfig(dim=16, depth=2, mixers=mixers),
        "linear_prediction": {"picture": [1, 4]} if picture == "image" else None,
    }
    whole, cut = task(**options).double(), task(**options, segment=segment, keep=keep).double()
    orders = [BOTH[0], BOTH[1], BOTH[0]]
    (a, seen), (b, again) = whole.loss(*whole.encode(rows, orders)), cut.loss(*cut.encode(rows, orders))
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    for name in seen:
        assert seen[name].numbers == again[name].numbers
        torch.testing.assert_close(seen[name].nats, again[name].nats)
    for (name, p), q in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_orders_are_drawn_in_training() -> None:
    module = task(orders=[*BOTH, ["words"]])
    rows = batch(5)
    torch.manual_seed(3)
    first = {tuple(module.encode(rows)[0].kind[:, 0].tolist()) for _ in range(8)}
    assert len(first) > 1
    torch.manual_seed(3)
    again = {tuple(module.encode(rows)[0].kind[:, 0].tolist()) for _ in range(8)}
    assert first == again
    kinds = torch.cat([module.encode(rows)[0].kind[:, -1] for _ in range(20)])
    assert (kinds == -1).any()  # words alone are shorter


def test_a_batch_of_one_modality() -> None:
    module = task(weights={"picture": 5}).double().eval()
    rows = batch(2)
    whole = {**rows, "parts": {"words": rows["parts"]["words"]}}
    loss, counted = module.loss(*module.encode(whole))
    assert counted["picture"].numbers == 0
    assert float(loss) == pytest.approx(float(counted["words"].bits))
    assert module.tokens_in(whole) == 7
    assert module.tokens_in(rows) == 7 + 24


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> dict[str, Any]:
        return batch(3, [1.0, 1.0, 0.0] if place == 3 else None, seed=place % 2)


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def test_training_learns_and_a_test_leaves_samples(tmp_path: Path) -> None:
    """Two rows learned by heart: the words by their picture, wholly right, which they cannot be before it."""
    module = task(
        orders=BOTH, weights={}, optim=OptimConfig(lr=0.02, warmup=2), samples=2, sample_lengths={"words": 3},
        backbone=BackboneConfig(dim=32, depth=1, mixers=["attention"]),
    )  # fmt: skip
    data = DataLoader(Rows(), batch_size=None)
    run = trainer(tmp_path, max_steps=40)
    run.fit(module, data)
    found = run.test(module, data, verbose=False)[0]
    assert set(found) == {
        "test/bits",
        *(f"test/{name}/{what}" for name in ("picture", "words", "picture_after_nothing", "picture_after_words",
          "words_after_nothing", "words_after_picture") for what in ("bits", "exact") if what == "bits" or name.startswith("words")),
    }  # fmt: skip
    assert found["test/words_after_picture/bits"] < found["test/words_after_nothing/bits"] < 8
    assert found["test/words_after_picture/exact"] > found["test/words_after_nothing/exact"]
    mean = (found["test/words_after_picture/bits"] + found["test/words_after_nothing/bits"]) / 2
    assert found["test/words/bits"] == pytest.approx(mean, abs=1e-5)
    names = {path.name for path in tmp_path.glob("samples*")}
    assert names == {
        "samples-picture-words-picture.png", "samples-words-picture-picture.png",
        *(f"samples-{order}-words-{place}.txt" for order in ("picture-words", "words-picture") for place in (0, 1)),
    }  # fmt: skip
    assert (tmp_path / "samples-words-picture-words-0.txt").stat().st_size == 3


def test_exact_is_what_greedy_generation_gets_right() -> None:
    from mmlong.generation import generate_spans
    from mmlong.heads import GREEDY

    module = task().eval()
    rows = batch(3)
    picture = module.joint.voices["picture"].modality.encode(rows["parts"]["picture"]["raw"])[0]
    made = generate_spans(module.joint, ["picture", "words"], {"words": 5}, {"picture": picture}, sampling=GREEDY)
    rows["parts"]["words"]["raw"] = made["words"].to(torch.uint8).clone()
    rows["parts"]["words"]["raw"][1, 1] += 1
    _, counted = module.loss(*module.encode(rows))
    assert (counted["words"].wrong == 0).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"word": 1.0}}, "model.weights has 'word'"),
        ({"weights": {"words": -1.0}}, "it is 0 or more"),
        ({"segment": 0}, "model.segment is 0"),
        ({"data_info": {"modalities": {"sound": {}}}}, "the data has 'sound'.*model.modalities only picture, words"),
    ],
    ids=["name", "negative", "segment", "data"],
)
def test_what_cannot_be_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**options)
