"""Fine-tuning from the command line: a run on another's backbone with adapters, what it leaves, and wrong words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import mmlong as package
from mmlong.training.adapters import ADAPTER, load_adapter
from mmlong.training.transfer import read_backbone

Call = Callable[..., tuple[int, str]]


def test_adapters_on_the_backbone_of_a_run(mmlong: Call, recipe: str) -> None:
    status, said = mmlong("fit", "-c", recipe, "--trainer.max_steps=2", "--run_dir=base")
    assert status == 0, said
    tuned = (
        "--trainer.max_steps=3", "--model.backbone_from=base", "--model.optim.lora.rank=2",
        "--model.optim.freeze=[modality]",
    )  # fmt: skip
    status, said = mmlong("fit", "-c", recipe, "--run_dir=tuned", *tuned)
    assert status == 0, said
    assert "parameters train, the others are frozen" in said
    assert f"{ADAPTER}/" in said
    model, again = package.load("tuned"), load_adapter("tuned")
    tokens, layout = model.encode(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    with torch.no_grad():
        assert torch.equal(model(tokens, None, layout)[0], again(tokens, None, layout)[0])
    merged, before = read_backbone("tuned")[0], read_backbone("base")[0]
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed
    assert all(name.endswith("weight") for name in changed)
    newest = str(max(Path("tuned/checkpoints").glob("step=*.ckpt")))
    status, said = mmlong("test", "-c", recipe, "--ckpt_path", newest, *tuned)
    assert status == 0, said
    status, said = mmlong("test", "-c", recipe, "--ckpt_path", newest)
    assert status == 1
    assert "trained other parts of the model" in said


def test_wrong_words_are_answered_with_the_nearest(mmlong: Call, recipe: str) -> None:
    status, said = mmlong("fit", "-c", recipe, "--model.optim.lora.rnak=2")
    assert status == 2
    assert "did you mean 'model.optim.lora.rank'" in said
    status, said = mmlong("fit", "-c", recipe, "--model.optim.freze=[head]")
    assert status == 2
    assert "did you mean 'model.optim.freeze'" in said
    status, said = mmlong("fit", "-c", recipe, "--model.optim.freeze=[modalty]")
    assert status == 1
    assert "no parameter matches 'modalty' (did you mean 'modality'?)" in said
    status, said = mmlong("fit", "-c", recipe, '--model.optim.lora={"rank": 2, "on": ["*.out_porj.*"]}')
    assert status == 1
    assert "did you mean 'out_proj'" in said
    status, said = mmlong("fit", "-c", recipe, "--model.optim.lora.rank=0")
    assert status != 0
    assert "rank is 0" in said
