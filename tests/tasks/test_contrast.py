from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.models import load_model, save_model
from mmlong.ops.nt_xent import neighbour_accuracy, nt_xent
from mmlong.tasks import ContrastTask
from mmlong.training.optim import OptimConfig


def by_definition(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """The formula of the paper, a term at a time in float64."""
    z = [v / math.sqrt((v * v).sum()) for v in np.concatenate([first, second])]
    count, losses = len(first), []
    for i in range(2 * count):
        j = (i + count) % (2 * count)
        below = sum(math.exp(z[i] @ z[k] / temperature) for k in range(2 * count) if k != i)
        losses.append(-math.log(math.exp(z[i] @ z[j] / temperature) / below))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_loss_is_the_papers(batch: int) -> None:
    draw = torch.Generator().manual_seed(batch)
    a, b = torch.randn(2, batch, 6, generator=draw)
    wanted = by_definition(a.double().numpy(), b.double().numpy(), 0.2)
    assert float(nt_xent(a, b, 0.2)) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    # The usual form by torch's cross-entropy: logits of everyone but oneself.
    z = F.normalize(torch.cat([a, b]).double(), dim=1)
    logits = (z @ z.T / 0.2).masked_select(~torch.eye(2 * batch, dtype=torch.bool)).view(2 * batch, -1)
    partner = torch.tensor([i + batch - 1 if i < batch else i - batch for i in range(2 * batch)])
    assert float(nt_xent(a, b, 0.2)) == pytest.approx(float(F.cross_entropy(logits, partner)), rel=1e-5, abs=1e-6)


def test_what_does_not_count_is_in_no_sum() -> None:
    a, b = torch.randn(2, 6, 4)
    counts = torch.tensor([True, False, True, True, False, True])
    a[1] = torch.nan
    a.requires_grad_()
    loss = nt_xent(a, b, 0.1, counts)
    keep = counts.nonzero()[:, 0]
    torch.testing.assert_close(loss, nt_xent(a[keep], b[keep], 0.1))
    none = nt_xent(torch.randn(2, 4, requires_grad=True), torch.randn(2, 4), 0.1, torch.zeros(2, dtype=torch.bool))
    assert float(none.detach()) == 0.0
    none.backward()


RANK = """
import sys, torch, torch.distributed as dist
from mmlong.ops.nt_xent import gather_rows, nt_xent
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
a, b = torch.load(f"{folder}/in.pt", weights_only=True)
mine = [t[3 * rank : 3 * rank + 3].clone().requires_grad_() for t in (a, b)]
loss = nt_xent(*mine, 0.3)
loss.backward()
torch.save((loss.detach(), [t.grad for t in mine], gather_rows(torch.arange(2) + 2 * rank)), f"{folder}/out{rank}.pt")
dist.barrier()  # a rank that leaves while the other still sends can abort in gloo
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_are_one_batch(tmp_path: Path) -> None:
    """Loss and gradient, as DDP averages them, are those of all rows in one process."""
    a, b = torch.randn(2, 6, 5)
    torch.save((a, b), tmp_path / "in.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    whole = [t.clone().requires_grad_() for t in (a, b)]
    # Order within a batch means nothing, so the ranks' rows in a row are one batch.
    loss = nt_xent(*whole, 0.3)
    loss.backward()
    found = [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss.detach())
    for n, t in enumerate(whole):
        torch.testing.assert_close(torch.cat([found[0][1][n], found[1][1][n]]) / 2, t.grad)
    assert found[0][2].tolist() == found[1][2].tolist() == [0, 1, 2, 3]


def test_neighbours_vote_as_defined() -> None:
    draw = torch.Generator().manual_seed(0)
    x, label = torch.randn(40, 5, generator=draw), torch.randint(3, (40,), generator=draw)
    z = F.normalize(x.double(), dim=1).numpy()
    for k in (1, 4, 99):
        right = 0
        for i in range(40):
            others = sorted((j for j in range(40) if j != i), key=lambda j: -(z[i] @ z[j]))[:k]
            votes = np.zeros(3)
            for j in others:
                votes[int(label[j])] += math.exp(z[i] @ z[j] / 0.07)
            right += int(votes.argmax() == int(label[i]))
        assert float(neighbour_accuracy(x, label, k)) == pytest.approx(right / 40)
    assert math.isnan(float(neighbour_accuracy(x[:1], label[:1])))


def task(modality: str = "image", **options: Any) -> ContrastTask:
    torch.manual_seed(0)
    known = {
        "image": {"size": [6, 6]},
        "image_bytes": {"size": [6, 6]},
        "audio": {"rate": 8000},
        "mulaw": {"rate": 8000},
    }.get(modality, {})
    settings: dict[str, Any] = {
        "modality": {"name": modality, **known},
        "backbone": BackboneConfig(dim=8, depth=1, mixers=["mamba2"], direction="alternate"),
        "head": {"num_classes": 8},
        "optim": OptimConfig(lr=0.01, warmup=2),
        "data_info": {"num_classes": 3},
    }
    return ContrastTask(**{**settings, **options})


def tones(count: int, length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Three pitches in noise; unequal lengths."""
    draw = torch.Generator().manual_seed(4)
    rows = []
    for n in range(count):
        phase = 6.28 * torch.rand((), generator=draw)
        tone = 0.5 * torch.sin(torch.arange(length) * (0.25, 0.9, 2.2)[n % 3] + phase)
        valid = length - (n % 4) * 5
        sound = torch.where(torch.arange(length) < valid, tone + 0.05 * torch.randn(length, generator=draw), 0)
        rows.append(
            {"raw": sound, "lengths": torch.tensor(valid), "label": torch.tensor(n % 3), "index": torch.tensor(n),
             "weight": torch.tensor(1.0)}
        )  # fmt: skip
    return rows


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def test_sounds_of_a_kind_come_together(tmp_path: Path) -> None:
    module = task("audio", views=["crop:0.7", "gain", "noise:0.05"])
    rows = tones(36)
    data: Any = DataLoader(rows, batch_size=12)
    run = trainer(tmp_path, max_steps=40, gradient_clip_val=1.0)
    before = run.validate(module, data, verbose=False)[0]
    torch.manual_seed(7)
    assert run.validate(module, data, verbose=False)[0] == before, "views of evaluation are the sample's own"
    filler = [*rows, *({**row, "weight": torch.tensor(0.0)} for row in rows[:6])]
    padded = run.validate(module, DataLoader(filler, batch_size=12), verbose=False)[0]  # type: ignore[arg-type]
    assert padded["val/accuracy"] == before["val/accuracy"]
    assert padded["val/loss"] == pytest.approx(before["val/loss"], rel=1e-5)
    run.fit(module, data)
    after = run.test(module, data, verbose=False)[0]
    assert after["test/loss"] < 0.8 * before["val/loss"]
    assert after["test/accuracy"] > 0.8
    save_model(module.model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").eval()
    raw, lengths = torch.stack([row["raw"] for row in rows[:3]]), torch.stack([row["lengths"] for row in rows[:3]])
    tokens, layout = loaded.encode(raw, lengths)
    x, _ = loaded.forward_features(tokens, None, layout)
    embedding = loaded.forward_head(x, layout, pre_logits=True)
    torch.testing.assert_close(embedding, module.eval().embed(raw, lengths))
    assert embedding.shape == (3, 8)


@pytest.mark.parametrize("modality", ["image", "image_bytes", "audio", "mulaw", "genome", "text"])
def test_every_kind_of_data_has_views(modality: str) -> None:
    module = task(modality)
    if modality.startswith("image"):
        batch = {"raw": torch.randint(256, (3, 1, 6, 6), dtype=torch.uint8)}
    elif modality in ("audio", "mulaw"):
        batch = {"raw": torch.rand(3, 31) - 0.5, "lengths": torch.tensor([31, 9, 2])}
    else:
        letters = torch.tensor(list(b"ACGT"), dtype=torch.uint8)[torch.randint(4, (3, 31))]
        batch = {"raw": letters, "lengths": torch.tensor([31, 9, 2])}
    loss = module.contrast(batch, [torch.Generator().manual_seed(n) for n in range(3)])
    loss.backward()
    assert float(loss.detach()) > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.model.parameters())


def test_the_data_may_give_both_views() -> None:
    module = task("audio").eval()
    b = torch.rand(3, 20) - 0.5
    a = torch.rand(3, 31) - 0.5
    lengths, lengths2 = torch.tensor([31, 30, 3]), torch.tensor([20, 4, 5])
    found = module.contrast({"raw": a, "lengths": lengths, "raw2": b, "lengths2": lengths2}, [])
    torch.testing.assert_close(found, nt_xent(module(a, lengths), module(b, lengths2), 0.1))
    with pytest.raises(ValueError, match="one document a row"):
        module.contrast({"raw": a, "resets": torch.zeros(3, 31, dtype=torch.bool)}, [])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="no view 'flop'.*did you mean 'flip'"):
        task(views=["flop"])
    with pytest.raises(ValueError, match="model.temperature is 0"):
        task(temperature=0)
