"""The state carried from batch to batch: as one long row, dropped where a row does not go on, resumed to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.records import Record, SequenceSource
from mmlong.datamodules.text import TextDataModule

from mmlong.backbone import BackboneConfig
from mmlong.tasks import AutoregressTask
from mmlong.tasks.carried import CarriedState
from mmlong.training.rng import RNGStateCallback

MIXERS: list[Any] = ["mamba2", {"name": "local", "window": 6}]


def task(dropout: float = 0.0, mixers: list[Any] = MIXERS, **options: Any) -> AutoregressTask:
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=8, depth=2, mixers=mixers, dropout=dropout, drop_path=dropout)
    return AutoregressTask({"name": "text"}, backbone, **{"carry": True, "samples": 0, **options})


def batch(raw: torch.Tensor, continues: list[bool], weight: list[float] | None = None) -> dict[str, torch.Tensor]:
    rows = len(raw)
    return {
        "raw": raw, "continues": torch.tensor(continues), "index": torch.arange(rows),
        "weight": torch.tensor(weight or [1.0] * rows),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"segment": 5}, {"segment": 5, "keep": 2, "truncate": True}])
@pytest.mark.parametrize("rows", [1, 3])
def test_batches_in_a_row_are_one_long_row(rows: int, options: dict[str, Any]) -> None:
    module = task(**options).double()
    raw = torch.randint(256, (rows, 39), dtype=torch.uint8)
    whole = task(carry=False).double().nats(batch(raw, [False] * rows))[0]
    parts = [module.nats(batch(raw[:, i : i + 13], [i > 0] * rows), carry=True)[0] for i in range(0, 39, 13)]
    torch.testing.assert_close(sum(parts), whole)
    parts[-1].backward()  # and the gradient stops at the batch
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())


def test_a_row_that_does_not_go_on_begins_anew() -> None:
    module, plain = task(segment=4).double(), task(carry=False).double()
    raw = torch.randint(256, (3, 22), dtype=torch.uint8)
    first, second = raw[:, :11], raw[:, 11:]
    module.nats(batch(first, [False] * 3, [1.0, 1.0, 0.0]), carry=True)
    # Row 0 goes on; row 1 does not; row 2 would, but was skipped and has a gap.
    found = module.nats(batch(second, [True, False, True]), carry=True)[0]
    alone = [False]
    long = plain.nats(batch(raw[:1], alone))[0] - plain.nats(batch(first[:1], alone))[0]
    expected = long + plain.nats(batch(second[1:2], alone))[0] + plain.nats(batch(second[2:], alone))[0]
    torch.testing.assert_close(found, expected)
    # Evaluation neither takes the state nor leaves one.
    torch.testing.assert_close(module.nats(batch(second, [True] * 3))[0], plain.nats(batch(second, [True] * 3))[0])


def packed(folder: Path) -> str:
    documents = [np.random.default_rng(n).integers(0, 9, 90 + 7 * n, dtype=np.uint8).tobytes() for n in range(6)]
    records = [Record(f"{n}.txt", partial(bytes, data), split="train") for n, data in enumerate(documents)]
    source = SequenceSource("made", "text", "txt", {}, "made up", "none needed", records)
    pack_sequences(source, folder / "packed", splits={})
    return str(folder / "packed")


class Recorded(AutoregressTask):
    """Notes which rows went on."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((batch["index"].tolist(), batch["continues"].tolist()))
        return super().training_step(batch, batch_idx)


def fit(folder: Path, data: str, checkpoint: Path | None, save: bool = False) -> Recorded:
    pl.seed_everything(3 if checkpoint is None else 99)
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=8, depth=2, mixers=MIXERS, dropout=0.2)
    module = Recorded({"name": "text"}, backbone, carry=True, segment=7, samples=0)
    module.seen = []
    callbacks: list[pl.Callback] = [RNGStateCallback()]
    if save:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=save, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, max_steps=16,
    )  # fmt: skip
    rows = TextDataModule(data, windows="stream", length=17, batch_size=3, carry=True, seed=2)
    trainer.fit(module, rows, ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    data = packed(tmp_path)
    whole = fit(tmp_path / "run", data, None, save=True)
    steps = len(whole.seen)
    carried = [flag for _, flags in whole.seen for flag in flags]
    assert 0.6 < sum(carried) / len(carried) < 1
    for step in (5, 13, 15):  # an epoch is 13 steps
        resumed = fit(tmp_path / "resumed", data, tmp_path / "run" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:steps], step
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (step, name)


def test_states_are_shared_out_among_other_ranks() -> None:
    """What two ranks saved, one takes, and the other way round: rows keep their places."""
    model = task().model
    tokens = torch.randint(256, (4, 9))
    layout = model.encode(tokens.byte())[1]
    _, state = model(tokens, None, None)

    def left(rows: slice) -> list[torch.Tensor]:
        carried = CarriedState()
        carried.after(model(tokens[rows], None, None)[1], torch.ones(len(tokens[rows]), dtype=torch.bool))
        (own,) = carried.saved() or []
        return own

    def begins(every: list[list[torch.Tensor]], rank: int, world: int, rows: slice) -> torch.Tensor:
        carried = CarriedState()
        carried.restore(every, rank, world)
        here = tokens[rows]
        state, _ = carried.before(model, here, layout, torch.ones(len(here), dtype=torch.bool))
        return model(here, state, None)[0]

    expected = model(tokens, state, None)[0]
    two, one = [left(slice(0, 2)), left(slice(2, 4))], [left(slice(0, 4))]
    torch.testing.assert_close(begins(two, 0, 1, slice(0, 4)), expected)
    for rank, rows in enumerate([slice(0, 2), slice(2, 4)]):
        torch.testing.assert_close(begins(one, rank, 2, rows), expected[rows])
        torch.testing.assert_close(begins(two, rank, 2, rows), expected[rows])
    with pytest.raises(ValueError, match="4 rows of 1 ranks, which 3 ranks cannot share"):
        begins(one, 0, 3, slice(0, 1))


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the state of Attention \(backbone.*\) grows with every token"):
        task(mixers=["attention"])
    raw = torch.zeros(2, 5, dtype=torch.uint8)
    rows = batch(raw, [False, False])
    del rows["continues"]
    with pytest.raises(ValueError, match="set data.windows: stream and data.carry: true"):
        task().nats(rows, carry=True)
    module = task()
    module.nats(batch(raw, [False] * 2), carry=True)
    with pytest.raises(ValueError, match="the batch has 3 rows, the state carried is of 2"):
        module.nats(batch(torch.zeros(3, 5, dtype=torch.uint8), [True] * 3), carry=True)
    for options in ({"keep": 2}, {"truncate": True}):
        with pytest.raises(ValueError, match=r"set model\.segment too"):
            task(**options)
    with pytest.raises(ValueError, match=r"model\.keep is 0"):
        task(segment=4, keep=0)
    with pytest.raises(ValueError, match="set windows: stream"):
        TextDataModule("stdlib", carry=True)
