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
from mmlong.modalities import MODALITIES
from mmlong.models import MaskedModel, load_model, save_model
from mmlong.tasks import MaskedTask, Masking
from mmlong.tasks.masking import HIDDEN, draw_fates
from mmlong.training.checkpoints import AtomicCheckpointIO
from mmlong.training.optim import OptimConfig
from mmlong.training.rng import RNGStateCallback, sample_generators

BOTH = {"dim": 8, "depth": 2, "mixers": ["mamba2"], "direction": "alternate"}

OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"size": [4, 5]},
    "image_bytes": {"size": [4, 5]},
    "audio": {"rate": 8000},
}


def task(name: str = "genome", **options: Any) -> MaskedTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "modality": {"name": name},
        "backbone": BackboneConfig(**BOTH),
        "optim": OptimConfig(lr=0.01, warmup=2),
        "masking": Masking(share=0.3, span=2),
        # Classes of the data are none of its business.
        "data_info": {"modality": OPTIONS.get(name, {}), "num_classes": 7},
    }
    return MaskedTask(**{**settings, **options})


def rows(count: int, length: int = 23, period: str = "") -> list[dict[str, torch.Tensor]]:
    """DNA of uneven lengths, right-padded."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for n in range(count):
        letters = torch.tensor(list(b"ACGT"), dtype=torch.uint8)[torch.randint(4, (length,), generator=draw)]
        if period:
            letters = torch.tensor(list((period * length)[n : n + length].encode()), dtype=torch.uint8)
        found.append(
            {
                "raw": letters,
                "lengths": torch.tensor(length - (n % 3) * 4),
                "index": torch.tensor(n),
                "weight": torch.tensor(1.0),
            }
        )
    return found


def batch(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, default_root_dir=folder, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip


def test_the_loss_is_the_cross_entropy_of_the_chosen_tokens_in_bits() -> None:
    module, b = task().eval(), batch(rows(3))
    draw = sample_generators(b["index"], 1)
    prediction, target, loss, count = module.predicted(b, draw)
    fates = draw_fates(module.masking, b["lengths"].tolist(), 23, sample_generators(b["index"], 1))
    tokens, _ = module.encode(b)
    assert torch.equal(target[0], tokens[fates > 0])
    assert int(count) == int((fates > 0).sum()) == sum(round(0.3 * n) for n in b["lengths"].tolist())
    plain = F.cross_entropy(prediction[0].double(), target[0], reduction="sum")
    torch.testing.assert_close(loss.double(), plain)
    logged: dict[str, torch.Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    module.validation_step(b, 0)
    assert float(logged["val/bits"]) == pytest.approx(float(plain / count / math.log(2)), rel=1e-5)
    assert logged["val/bits"] == logged["val/loss"]
    assert float(logged["val/accuracy"]) == pytest.approx(float((prediction.argmax(-1) == target).float().mean()))


@pytest.mark.parametrize("modality", ["genome", "image_bytes"])
def test_a_hidden_token_plays_no_part(modality: str) -> None:
    module = task(modality).eval()
    model = module.model
    assert isinstance(model, MaskedModel)
    codes = model.modality.codes
    assert codes is not None
    length = model.modality.tokens_per_sample() or 13
    tokens = torch.randint(codes, (2, length))
    hidden = torch.rand(2, length) < 0.4
    other = torch.where(hidden, (tokens + 1) % codes, tokens)
    one, two = (model(t, None, None, hidden)[0] for t in (tokens, other))
    assert torch.equal(one, two)
    shown, changed = (model(t, None, None)[0] for t in (tokens, other))
    assert not torch.allclose(shown, changed)
    torch.testing.assert_close(model(tokens, None, None, torch.zeros_like(hidden))[0], shown)


def test_nothing_counts_but_valid_tokens_of_samples_that_count() -> None:
    module, items = task().eval(), rows(3)
    b = batch(items)
    wanted = module.predicted(b, sample_generators(b["index"], 1))
    garbage = {**b, "raw": b["raw"].clone()}
    for row, length in enumerate(b["lengths"].tolist()):
        garbage["raw"][row, length:] = ord("N")
    filler = batch([*items, {**items[0], "weight": torch.tensor(0.0)}])
    for other in (garbage, filler):
        found = module.predicted(other, sample_generators(other["index"], 1))
        for a, b_ in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b_, rtol=1e-5, atol=1e-5)
    alone = [module.predicted(batch([item]), sample_generators(item["index"][None], 1)) for item in items]
    assert sum(float(one[2].detach()) for one in alone) == pytest.approx(float(wanted[2].detach()), rel=1e-5)
    none = batch([{**item, "weight": torch.tensor(0.0)} for item in items])
    loss, count = module.predicted(none, sample_generators(none["index"], 1))[2:]
    assert float(loss.detach()) == float(count) == 0.0
    loss.backward()


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_real_tokens_are_regressed(modality: str) -> None:
    module = task(modality).eval()
    draw = torch.Generator().manual_seed(0)
    if modality == "image":
        b = {"raw": torch.randint(256, (3, 1, 4, 5), dtype=torch.uint8, generator=draw), "index": torch.arange(3)}
    else:
        raw = torch.rand(3, 20, generator=draw) * 2 - 1
        b = {"raw": raw, "lengths": torch.tensor([20, 11, 3]), "index": torch.arange(3)}
    prediction, target, loss, count = module.predicted(b, sample_generators(b["index"], 1))
    torch.testing.assert_close(loss / count, F.mse_loss(prediction, target))
    tokens, _ = module.encode(b)
    fates = draw_fates(
        module.masking, b.get("lengths", torch.full((3,), 20)).tolist(), 20, sample_generators(b["index"], 1)
    )
    torch.testing.assert_close(target[0], tokens[fates > 0])
    loss.backward()
    assert module.model.mask.grad is not None
    assert float(module.model.mask.grad.abs().sum()) > 0


def test_it_learns_a_pattern_from_both_sides_and_is_evaluated_on_the_same_tokens(tmp_path: Path) -> None:
    module = task(masking=Masking(share=0.2))
    data: Any = DataLoader(rows(24, period="ACGGT"), batch_size=6)
    run = trainer(tmp_path, max_steps=80, gradient_clip_val=1.0)
    before = run.validate(module, data, verbose=False)[0]
    torch.manual_seed(99)
    assert run.validate(module, data, verbose=False)[0] == before, "whatever the global generator says"
    smaller: Any = DataLoader(rows(24, period="ACGGT"), batch_size=4)
    again = run.validate(module, smaller, verbose=False)[0]
    assert again == pytest.approx(before, rel=1e-4), "and however the samples are batched"
    assert before["val/bits"] > 1.5
    run.fit(module, data)
    after = run.test(module, data, verbose=False)[0]
    assert after["test/bits"] < 1.0
    assert after["test/accuracy"] > 0.7
    save_model(module.model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").eval()
    assert isinstance(loaded, MaskedModel)
    tokens, layout = module.encode(batch(rows(2)))
    hidden = torch.arange(23).expand(2, -1) % 3 == 0
    assert torch.equal(loaded(tokens, None, layout, hidden)[0], module.model.eval()(tokens, None, layout, hidden)[0])


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    # Every batch the same, and a loader that leaves the global generator alone: only the masks could differ.
    data: Any = DataLoader(rows(3) * 6, batch_size=3, generator=torch.Generator())
    whole = task()
    half = _SaveAt(3, tmp_path / "half.ckpt")
    trainer(tmp_path, max_steps=6, callbacks=[RNGStateCallback(), half]).fit(whole, data)
    resumed, other = task(), task()
    for module, callbacks in ((resumed, [RNGStateCallback()]), (other, [])):
        torch.manual_seed(1234)
        trainer(tmp_path, max_steps=6, callbacks=callbacks).fit(
            module, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
    same = [torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(other.model.mask, whole.model.mask), "without the generator's state other tokens are chosen"  # type: ignore[arg-type]


class _SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("modality", MODALITIES.names())
def test_every_registered_modality_trains(modality: str) -> None:
    """Codes and real values, with and without lengths, and documents packed into rows."""
    for options in MODALITIES[modality].example_options():
        module = task(modality={"name": modality, **options}, data_info={})
        model = module.model
        draw = torch.Generator().manual_seed(5)
        raw, lengths, resets = model.modality.example(3, 24, draw)
        model.modality.initialise(raw)
        b = {"raw": raw, "lengths": lengths, "resets": resets}
        b = {key: value for key, value in b.items() if value is not None}
        b["index"] = torch.arange(3)
        prediction, target, loss, count = module.predicted(b, sample_generators(b["index"], 1))
        assert target.shape[1] > 0
        assert prediction.shape[:2] == target.shape[:2]
        assert (target.ndim == 2) == (model.modality.codes is not None)
        assert math.isfinite(float(loss.detach()))
        (loss / count).backward()
        assert model.mask.grad is not None, options


def test_models_that_cannot_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sees the past only: set backbone\.direction"):
        task(backbone=BackboneConfig(dim=8, depth=1))
    with pytest.raises(ValueError, match=r"makes one of 4: leave backbone\.pool empty"):
        task(backbone=BackboneConfig(dim=[8, 8], depth=[1, 1], pool=[4], direction="both"))
    with pytest.raises(ValueError, match="head 'classify' predicts one thing a sequence"):
        task(head={"name": "classify"})


def test_hiding_is_the_same_on_both_strands() -> None:
    module = task(backbone=BackboneConfig(**BOTH, reverse_complement=True))
    model = module.model
    assert isinstance(model, MaskedModel)
    raw = batch(rows(2))["raw"]
    other = torch.tensor(list(b"TGCA"), dtype=torch.uint8)[
        torch.searchsorted(torch.tensor(list(b"ACGT")), raw.long()).flip(1)
    ]
    hidden = torch.rand(2, 23) < 0.3
    x, _ = model.forward_features(model.encode(raw)[0], None, None, hidden)
    y, _ = model.forward_features(model.encode(other)[0], None, None, hidden.flip(1))
    first, second = y.flip(1).chunk(2, -1)
    torch.testing.assert_close(torch.cat([second, first], -1), x, rtol=1e-4, atol=1e-5)
    assert HIDDEN == 1
