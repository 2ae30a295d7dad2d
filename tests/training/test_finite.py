from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmlong.training.finite import NonFiniteError, StopOnNaN


class Net(pl.LightningModule):
    """Goes wrong in its ``at``-th batch: in the loss, or in the gradient alone."""

    def __init__(self, at: int, where: str) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(2, 1), nn.Linear(2, 1)
        self.at, self.where, self.calls = at, where, 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        out = self.good(batch["x"]).mean()
        if self.calls == self.at:
            out = out * float("inf") if self.where == "loss" else out + (self.bad.weight.sum() * 0).abs().sqrt()
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(net: Net, accumulate: int = 1) -> None:
    data = [{"x": torch.ones(2), "index": torch.tensor(10 * n)} for n in range(8)]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[StopOnNaN()], logger=False, enable_checkpointing=False,
        accumulate_grad_batches=accumulate, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(data, batch_size=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "accumulate", "said", "samples"),
    [
        ("loss", 1, r"the loss is -?inf in step 3 \(samples 40, 50\)", [40, 50]),
        ("gradient", 1, r"the gradient of bad.weight is not finite in step 3", [40, 50]),
        ("loss", 2, r"the loss is -?inf in step 2 \(samples 40, 50\)", [40, 50]),
        ("gradient", 2, r"the gradient of bad.weight is not finite in step 2", [40, 50, 60, 70]),
    ],
)
def test_it_stops_before_a_weight_changes(where: str, accumulate: int, said: str, samples: list[int]) -> None:
    net = Net(3, where)
    with pytest.raises(NonFiniteError, match=said) as caught:
        fit(net, accumulate)
    assert caught.value.samples == samples
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_sound_run_is_left_alone() -> None:
    net = Net(0, "loss")
    fit(net)
    assert net.calls == 4
