from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.layout import scan_order
from mmlong.tasks import ClassifyTask
from mmlong.training.optim import OptimConfig

SIZE = [6, 7]


def task(**options: Any) -> ClassifyTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "modality": {"name": "image", "order": "morton"},
        "backbone": BackboneConfig(dim=8, depth=1, mixers=["s4d"]),
        "data_info": {"modality": {"size": SIZE, "channels": 1}, "num_classes": 3, "class_names": ["a", "b", "c"]},
    }
    return ClassifyTask(**{**settings, **options})


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "raw": torch.randint(256, (1, *SIZE), dtype=torch.uint8, generator=draw),
            "label": torch.tensor(n % 3),
            "index": torch.tensor(n),
            "weight": torch.tensor(1.0),
        }
        for n in range(count)
    ]


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_padding_counts_nowhere(tmp_path: Any) -> None:
    real = samples(7)
    padded = [*real, {**real[0], "weight": torch.tensor(0.0)}, {**real[1], "weight": torch.tensor(0.0)}]
    module = task()
    found = [
        trainer(default_root_dir=tmp_path).test(module, DataLoader(rows, batch_size=3), verbose=False)[0]  # type: ignore[arg-type]
        for rows in (real, padded)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert int(module.confusion_counts.sum()) == 7
    logits = module(torch.stack([row["raw"] for row in real]))
    labels = torch.tensor([int(row["label"]) for row in real])
    assert found[0]["test/accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert found[0]["test/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_the_loss_is_torchs_over_the_samples_that_count(weights: torch.Tensor | None) -> None:
    module = task(label_smoothing=0.1)
    module.weights = weights
    logits, label = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    counts = torch.tensor([True, True, False, True, False])
    wanted = F.cross_entropy(logits[counts], label[counts], weight=weights, label_smoothing=0.1)
    torch.testing.assert_close(module.loss(logits, label, counts), wanted)
    logits[2] = float("inf")
    torch.testing.assert_close(module.loss(logits, label, counts), wanted)
    none = module.loss(torch.randn(5, 3, requires_grad=True), label, torch.zeros(5, dtype=torch.bool))
    assert float(none.detach()) == 0.0
    none.backward()


def test_averaged_weights_leave_the_scan_order_as_it_is() -> None:
    """Averaging buffers rounds 3 * (1 - d) + 3 * d down to 2, in whatever shares the tensor too."""
    before = scan_order(tuple(SIZE), "morton").clone()
    module = task(optim=OptimConfig(ema=0.9, warmup=1))
    data: Any = DataLoader(samples(12), batch_size=3)
    trainer(max_steps=4, val_check_interval=2).fit(module, data, data)
    assert torch.equal(module.model.modality.order_index, before)
    assert torch.equal(scan_order(tuple(SIZE), "morton"), before)
    raw = samples(2)[1]["raw"][None]
    assert torch.equal(module.model.modality.decode(*module.model.encode(raw)), raw)


def test_balanced_weights_come_from_the_data_and_steps_from_the_trainer() -> None:
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        trainer(max_epochs=1).fit(task(), DataLoader(samples(3)))  # type: ignore[arg-type]
