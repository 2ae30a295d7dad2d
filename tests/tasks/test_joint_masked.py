"""Masked joint training: shares of each modality, whole spans, a loss that is what was chosen, and evaluation on the same tokens always."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.tasks import JointMaskedTask, Masking
from mmlong.tasks.masking import HIDDEN, KEPT, REPLACED
from mmlong.training.optim import OptimConfig
from mmlong.training.rng import sample_generators

SIZE = [3, 4]
BOTH = [["picture", "words"], ["words", "picture"]]


def task(picture: str = "image_bytes", **options: Any) -> JointMaskedTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "modalities": {"picture": {"name": picture, "order": "raster"}, "words": {"name": "text"}},
        "backbone": BackboneConfig(dim=16, depth=2, mixers=["mamba2"], direction="alternate"),
        "masking": Masking(share=0.4, span=2),
        "data_info": {"modalities": {"picture": {"size": SIZE, "channels": 1}, "words": {}}},
    }
    return JointMaskedTask(**{**settings, **options})


def batch(rows: int, weight: list[float] | None = None, seed: int = 1) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "parts": {
            "picture": {"raw": torch.randint(256, (rows, 1, *SIZE), dtype=torch.uint8, generator=draw)},
            "words": {
                "raw": torch.randint(256, (rows, 10), dtype=torch.uint8, generator=draw),
                "lengths": torch.tensor([10, 5, 1, 7][:rows]),
            },
        },
        "index": torch.arange(rows) + seed,
        "weight": torch.tensor(weight or [1.0] * rows),
    }


def draws(rows: dict[str, Any]) -> list[torch.Generator]:
    return sample_generators(rows["index"], 1)


def test_every_modality_has_its_own_share() -> None:
    module = task(masking_of={"words": {"share": 0.8, "hide": 1.0, "replace": 0.0}})
    rows = batch(4, [1.0, 1.0, 1.0, 0.0])
    spans, _ = module.encode(rows, [BOTH[0], BOTH[1], BOTH[0], BOTH[0]])
    fates = module.draw(spans, draws(rows), 0.0)
    for row, length in enumerate([10, 5, 1]):
        assert int((fates[row][spans.kind[row] == 0] > 0).sum()) == 5  # 0.4 of 12 pixels
        assert int((fates[row][spans.kind[row] == 1] == HIDDEN).sum()) == max(round(0.8 * length), 1)
    assert not fates[spans.kind < 0].any()
    assert not fates[3].any()  # of weight 0
    assert torch.equal(module.draw(spans, draws(rows), 0.0), fates)


def test_whole_spans_are_hidden_and_nothing_beside_them() -> None:
    module = task()
    rows = batch(4)
    spans, _ = module.encode(rows, [BOTH[0]] * 4)
    seen = set()
    for seed in range(12):
        fates = module.draw(spans, [torch.Generator().manual_seed(100 * seed + row) for row in range(4)], 1.0)
        for row in range(4):
            (hidden,) = spans.kind[row][fates[row] > 0].unique().tolist()
            assert bool((fates[row][spans.kind[row] == hidden] == HIDDEN).all())
            seen.add(hidden)
    assert seen == {0, 1}
    alone, _ = module.encode(rows, [["words"]] * 4)
    fates = module.draw(alone, draws(rows), 1.0)
    assert int((fates[0] > 0).sum()) == 4  # a row of one span is masked as any other


@pytest.mark.parametrize("picture", ["image_bytes", "image"])
def test_what_is_replaced_is_of_the_same_span(picture: str) -> None:
    module = task(picture, masking=Masking(share=0.5, hide=0.0, replace=0.6))
    rows = batch(3)
    spans, _ = module.encode(rows, [BOTH[1]] * 3)
    fates = module.draw(spans, draws(rows), 0.0)
    seen = module.seen(spans, fates, draws(rows))
    assert bool((fates == REPLACED).any())
    assert bool((fates == KEPT).any())
    changed = 0
    for name, tokens in spans.tokens.items():
        number = module.masked.names.index(name)
        swapped = (fates == REPLACED) & (spans.kind == number)
        assert torch.equal(seen.tokens[name][~swapped], tokens[~swapped])
        changed += int((seen.tokens[name][swapped] != tokens[swapped]).sum())
        if name == "picture" and picture == "image":
            for row in range(3):
                known = tokens[row][spans.kind[row] == number].flatten().tolist()
                assert set(seen.tokens[name][row][swapped[row]].flatten().tolist()) <= set(known)
    assert changed > 0


def test_the_loss_is_the_mean_of_each_modality_by_its_weight() -> None:
    module = task("image", weights={"words": 3}).double().eval()
    rows = batch(3, [1.0, 1.0, 0.0])
    spans, layout = module.encode(rows, [BOTH[0]] * 3)
    fates = module.draw(spans, draws(rows), 0.0)
    guessed = module.guessed(spans, layout, fates, draws(rows))
    x, _ = module.masked.forward_features(module.seen(spans, fates, draws(rows)), None, layout, fates == HIDDEN)
    wanted = {}
    for number, (name, voice) in enumerate(module.masked.voices.items()):
        here = (fates > 0) & (spans.kind == number)
        said, target = voice.head(x[here][None]), spans.tokens[name][here][None]
        if name == "words":
            wanted[name] = F.cross_entropy(said[0], target[0]) / math.log(2)
            right = (said.argmax(-1) == target).double().mean()
            assert float(guessed[name].told()["accuracy"]) == pytest.approx(float(right))
            assert float(guessed[name].told()["bits"]) == pytest.approx(float(wanted[name]), rel=1e-5)
        else:
            wanted[name] = F.mse_loss(said, target.to(said.dtype))
            assert float(guessed[name].told()["error"]) == pytest.approx(float(wanted[name]), rel=1e-5)
    loss = module.loss(guessed)
    assert float(loss) == pytest.approx(float((wanted["picture"] + 3 * wanted["words"]) / 4), rel=1e-5)
    assert guessed["words"].tokens == 4 + 2
    nothing = module.guessed(spans, layout, torch.zeros_like(fates), draws(rows))
    assert float(module.loss(nothing)) == 0.0
    module.loss(nothing).backward()


class Rows(torch.utils.data.Dataset):
    """A picture of one brightness and four bytes that say which."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> dict[str, Any]:
        which = torch.arange(4) % 2
        raw = torch.where(which == 0, 40, 200).to(torch.uint8)
        words = torch.tensor([list(b"oooo"), list(b"####")], dtype=torch.uint8)[which]
        return {
            "parts": {
                "picture": {"raw": raw[:, None, None, None].expand(4, 1, *SIZE).contiguous()},
                "words": {"raw": words, "lengths": torch.full((4,), 4)},
            },
            "index": 4 * place + torch.arange(4),
        }


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def test_words_are_learned_from_their_picture(tmp_path: Path) -> None:
    module = task(orders=BOTH, whole=0.5, optim=OptimConfig(lr=0.01, warmup=2))
    data: Any = DataLoader(Rows(), batch_size=None)
    run = trainer(tmp_path, max_steps=80, gradient_clip_val=1.0)
    before = run.validate(module, data, verbose=False)[0]
    torch.manual_seed(99)
    assert run.validate(module, data, verbose=False)[0] == before, "whatever the global generator says"
    run.fit(module, data)
    found = run.test(module, data, verbose=False)[0]
    shared = {f"test/{name}{what}/{metric}" for name in ("picture", "words") for what in ("", "_from_others") for metric in ("bits", "accuracy")}  # fmt: skip
    assert set(found) == {"test/loss", "test/words_from_others/exact", *shared}
    assert before["val/words_from_others/exact"] < 0.5
    assert found["test/words_from_others/exact"] == 1.0
    assert found["test/words_from_others/bits"] < 0.5 < before["val/words_from_others/bits"]
    assert found["test/picture_from_others/accuracy"] > 0.7  # either brightness alone: 0.5


class Halves(Rows):
    """Batches of which only the first two rows have a picture."""

    def __getitem__(self, place: int) -> dict[str, Any]:
        found = super().__getitem__(place)
        raw = found["parts"]["picture"]["raw"]
        return {**found, "parts": {**found["parts"], "picture": {"raw": raw[:2], "rows": torch.tensor([0, 1])}}}


def test_from_others_is_of_rows_that_have_others(tmp_path: Path) -> None:
    """What is told of a row that has no other span would be a guess from nothing."""
    module = task(whole=0.5)
    told = {}
    for name, data in (("halves", Halves()), ("all", Rows())):
        run = trainer(tmp_path, max_steps=1)
        told[name] = run.validate(module, DataLoader(data, batch_size=None), verbose=False)[0]  # type: ignore[arg-type]
    # Rows repeat after two, so the first two alone give what all four do.
    for what in ("bits", "accuracy", "exact"):
        key = f"val/words_from_others/{what}"
        assert told["halves"][key] == pytest.approx(told["all"][key], rel=1e-4), key


def test_without_whole_spans_nothing_is_told_of_them(tmp_path: Path) -> None:
    module = task("image")
    found = trainer(tmp_path, max_steps=1).validate(module, DataLoader(Rows(), batch_size=None), verbose=False)[0]
    assert set(found) == {"val/loss", "val/picture/error", "val/words/bits", "val/words/accuracy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"word": 1.0}}, "model.weights has 'word'"),
        ({"masking_of": {"word": {}}}, "model.masking_of has 'word'"),
        (
            {"masking_of": {"words": {"shares": 0.1}}},
            "model.masking_of.words has no option 'shares' .did you mean 'share'",
        ),
        ({"masking_of": {"words": {"share": 2.0}}}, "masking.share is 2.0"),
        ({"whole": 1.5}, "model.whole is 1.5"),
        ({"backbone": BackboneConfig(dim=8, depth=1)}, "sees the past only"),
    ],
    ids=["weight", "name", "option", "share", "whole", "causal"],
)
def test_what_cannot_be_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        task(**options)
