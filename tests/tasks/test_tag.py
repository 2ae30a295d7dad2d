"""Tagging, regression and several labels at once: what counts, against torch and scikit-style definitions by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.layout import scan_order
from mmlong.tasks import MaskedTask, MultiLabelTask, RegressTask, TagTask
from mmlong.training.optim import OptimConfig

Rows = list[dict[str, torch.Tensor]]
LENGTH = 19


def options(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "modality": {"name": "genome"},
        "backbone": BackboneConfig(dim=8, depth=2, mixers=["mamba2"], direction="alternate"),
        "optim": OptimConfig(lr=0.02, warmup=2),
        **changes,
    }


def trainer(folder: Path, **changes: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, default_root_dir=folder, **changes,
    )  # fmt: skip


def dna(count: int) -> Rows:
    """Letters of uneven lengths; a tag for each: is the letter before it a G? What the other two learn counts letters."""
    draw = torch.Generator().manual_seed(2)
    rows = []
    for n in range(count):
        codes = torch.randint(4, (LENGTH,), generator=draw)
        length = LENGTH - (n % 3) * 5
        tags = F.pad(codes[:-1] == 2, (1, 0)).long()
        tags[length:] = -100
        tags[n % 4] = -100
        share = F.one_hot(codes[:length], 4).float().mean(0)
        rows.append(
            {
                "raw": torch.tensor(list(b"ACGT"), dtype=torch.uint8)[codes],
                "lengths": torch.tensor(length),
                "tags": tags,
                "target": torch.stack([share[0] - share[1], 3 * share[2]]),
                "labels": (share > 0.25).long(),
                "index": torch.tensor(n),
                "weight": torch.tensor(1.0),
            }
        )
    return rows


def labelled(rows: Rows, key: str) -> Rows:
    return [{**row, "label": row[key]} for row in rows]


def batch(rows: Rows) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def with_fillers(rows: Rows) -> Rows:
    return [*rows, *({**row, "weight": torch.tensor(0.0)} for row in rows[:5])]


def loader(rows: Rows, size: int = 6) -> Any:
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]


def test_tags_are_learned_and_only_labelled_tokens_count(tmp_path: Path) -> None:
    module, rows = TagTask(**options(head={"num_classes": 2})), labelled(dna(30), "tags")
    run = trainer(tmp_path, max_steps=60, gradient_clip_val=1.0)
    run.fit(module, loader(rows))
    found = run.test(module, loader(rows), verbose=False)[0]
    assert found["test/accuracy"] > 0.9
    padded = run.test(module, loader(with_fillers(rows), 7), verbose=False)[0]
    assert padded == pytest.approx(found, rel=1e-5)
    b = batch(rows)
    with torch.no_grad():
        logits = module.eval()(b["raw"], b["lengths"])
    keep = b["label"] != -100
    said, true = logits[keep].argmax(-1).numpy(), b["label"][keep].numpy()
    assert found["test/accuracy"] == pytest.approx(float((said == true).mean()), abs=1e-6)
    f1 = [2 * ((said == c) & (true == c)).sum() / ((said == c).sum() + (true == c).sum()) for c in (0, 1)]
    assert found["test/f1"] == pytest.approx(float(np.mean(f1)), abs=1e-6)
    wanted = F.cross_entropy(logits[keep], b["label"][keep])
    assert found["test/loss"] == pytest.approx(float(wanted), rel=1e-4)
    said_again = module.predict_step(b, 0)
    assert torch.equal(said_again["tags"], logits.argmax(-1))
    assert torch.equal(said_again["lengths"], b["lengths"])


def test_labels_at_padding_and_of_skipped_samples_are_nothing() -> None:
    module, rows = TagTask(**options(head={"num_classes": 2})).eval(), labelled(dna(4), "tags")
    clean = batch(rows)
    dirty = {key: value.clone() for key, value in clean.items()}
    for row, length in enumerate(clean["lengths"].tolist()):
        dirty["label"][row, length:] = 1
    dirty["weight"][3] = 0
    dirty["label"][3] = 1
    everyone = torch.tensor([True, True, True, False])
    prediction, target = module.predicted(dirty)
    wanted = module.loss(*module.predicted(batch(rows[:3])), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(module.loss(prediction, target, everyone), wanted)


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_pixels_are_labelled_by_their_place_in_the_picture(order: str) -> None:
    module = TagTask(**options(modality={"name": "image", "size": [4, 5], "order": order}, head={"num_classes": 3}))
    raw, label = torch.randint(256, (2, 1, 4, 5), dtype=torch.uint8), torch.randint(3, (2, 4, 5))
    _, target = module.predicted({"raw": raw, "label": label})
    assert torch.equal(target, label.flatten(1)[:, scan_order((4, 5), order)])
    with pytest.raises(ValueError, match=r"one label a token, \(B, 20\), got \(2, 4, 4\)"):
        module.predicted({"raw": raw, "label": label[..., :4]})


def test_numbers_are_learned_and_measured(tmp_path: Path) -> None:
    rows = dna(30)
    module = RegressTask(**options(data_info={"num_targets": 2, "num_classes": 9}))
    run = trainer(tmp_path, max_steps=80, gradient_clip_val=1.0)
    before = run.validate(module, loader(rows), verbose=False)[0]
    run.fit(module, loader(rows))
    found = run.test(module, loader(rows), verbose=False)[0]
    assert found["test/mse"] < 0.3 * before["val/mse"]
    assert run.test(module, loader(with_fillers(rows), 7), verbose=False)[0] == pytest.approx(found, rel=1e-4)
    b = batch(rows)
    said = module.eval().predict_step(b, 0)["prediction"].detach().double().numpy()
    true = b["target"].double().numpy()
    assert found["test/mse"] == pytest.approx(float(((said - true) ** 2).mean()), rel=1e-4)
    assert found["test/loss"] == pytest.approx(found["test/mse"], rel=1e-4)
    assert found["test/mae"] == pytest.approx(float(abs(said - true).mean()), rel=1e-4)
    pearson = [np.corrcoef(said[:, k], true[:, k])[0, 1] for k in (0, 1)]
    assert found["test/pearson"] == pytest.approx(float(np.mean(pearson)), abs=1e-3)


def test_one_number_will_do_and_a_robust_error_too(tmp_path: Path) -> None:
    rows = [{**row, "target": row["target"][:1]} for row in dna(9)]
    module = RegressTask(**options(head={"error": "huber"}))
    found = trainer(tmp_path, max_steps=1).validate(module, loader(rows), verbose=False)[0]
    b = batch(rows)
    wanted = F.huber_loss(module.eval()(b["raw"], b["lengths"]), b["target"])
    assert found["val/loss"] == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert -1 <= found["val/pearson"] <= 1


def test_several_labels_at_once(tmp_path: Path) -> None:
    rows = labelled(dna(30), "labels")
    module = MultiLabelTask(**options(data_info={"num_classes": 4}))
    run = trainer(tmp_path, max_steps=80, gradient_clip_val=1.0)
    before = run.validate(module, loader(rows), verbose=False)[0]
    run.fit(module, loader(rows))
    found = run.test(module, loader(with_fillers(rows), 7), verbose=False)[0]
    assert found["test/loss"] < 0.8 * before["val/loss"]
    b = batch(rows)
    logits = module.eval()(b["raw"], b["lengths"]).detach()
    assert found["test/loss"] == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, b["label"].float())), rel=1e-4
    )
    assert found["test/accuracy"] == pytest.approx(float(((logits > 0) == b["label"]).float().mean()), abs=1e-6)
    areas = []
    for k in range(4):
        yes, no = logits[b["label"][:, k] == 1, k], logits[b["label"][:, k] == 0, k]
        areas.append(((yes[:, None] > no).float() + 0.5 * (yes[:, None] == no)).mean())
    assert found["test/auc"] == pytest.approx(float(torch.stack(areas).mean()), abs=1e-5)


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(ValueError, match="makes one of 4: leave backbone.pool empty"):
        TagTask(
            **options(
                backbone=BackboneConfig(dim=[8, 8], depth=[1, 1], pool=[4], direction="both"), head={"num_classes": 2}
            )
        )
    module = RegressTask(**options())
    with pytest.raises(ValueError, match=r"learns batch\['target'\], and the data has only index, lengths, raw"):
        module.predicted({key: value for key, value in batch(dna(2)).items() if key in ("raw", "lengths", "index")})
    with pytest.raises(ValueError, match="multilabel"):
        task = MultiLabelTask(**options(data_info={"num_classes": 4}))
        b = batch(labelled(dna(2), "index"))
        task.training_step(b, 0)


def test_what_is_predicted_is_a_row_a_sample() -> None:
    rows = with_fillers(dna(6))
    tag = TagTask(**options(data_info={"num_classes": 2, "class_names": ["other", "after_G"]})).eval()
    b = batch(labelled(rows, "tags"))
    found = list(tag.prediction_rows(tag.predict_step(b, 0)))
    assert [row["index"] for row in found] == list(range(6)), "fillers are no samples"
    assert [len(row["tags"].split()) for row in found] == b["lengths"][:6].tolist()
    assert {word for row in found for word in row["tags"].split()} <= {"other", "after_G"}
    regress = RegressTask(**options(data_info={"num_targets": 2})).eval()
    numbers = list(regress.prediction_rows(regress.predict_step(b, 0)))
    wanted = regress(b["raw"], b["lengths"])
    assert [list(row) for row in numbers] == [["index", "value0", "value1"]] * 6
    assert float(numbers[4]["value1"]) == pytest.approx(float(wanted[4, 1].detach()), rel=1e-4)
    several = MultiLabelTask(**options(data_info={"num_classes": 2, "class_names": ["Max", "Myc"]})).eval()
    chances = list(several.prediction_rows(several.predict_step(b, 0)))
    assert float(chances[0]["Myc"]) == pytest.approx(
        float(several(b["raw"], b["lengths"])[0, 1].sigmoid().detach()), rel=1e-4
    )
    masked = MaskedTask(**options()).eval()
    with pytest.raises(ValueError, match="MaskedTask says nothing of a sample as a whole"):
        masked.predict_step(b, 0)
