from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from mmlong.training.checkpoints import (
    PARTIAL,
    AtomicCheckpointIO,
    BadCheckpointError,
    CheckpointWriteError,
    newest_whole,
    read_checkpoint,
)


def write(path: Path, numbers: int = 100) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(numbers, dtype=torch.float64)}}, path)


@pytest.mark.parametrize("limit", [10, 3000, 40_000])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(limit: int, tmp_path: Path) -> None:
    write(tmp_path / "step=1.ckpt")
    before = (tmp_path / "step=1.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for name in ("step=1.ckpt", "step=2.ckpt"):
            with pytest.raises(
                CheckpointWriteError, match=rf"cannot write .*{name}: .*earlier checkpoints are untouched"
            ):
                write(tmp_path / name, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert (tmp_path / "step=1.ckpt").read_bytes() == before


def test_the_newest_that_loads_is_chosen_by_step_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write(tmp_path / f"step={step}.ckpt")
    assert newest_whole(tmp_path) == (tmp_path / "step=100.ckpt", [])
    whole = (tmp_path / "step=100.ckpt").read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "step=100.ckpt").write_bytes(whole[:size])
        assert newest_whole(tmp_path) == (tmp_path / "step=10.ckpt", [tmp_path / "step=100.ckpt"])
    (tmp_path / ("step=200.ckpt" + PARTIAL)).write_bytes(whole)
    assert newest_whole(tmp_path)[0] == tmp_path / "step=10.ckpt"


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"weights": 1}, path)
    with pytest.raises(BadCheckpointError, match="holds no state_dict"):
        read_checkpoint(path)
    torch.save({"state_dict": Path("x")}, path)
    with pytest.raises(BadCheckpointError, match="never loaded"):
        read_checkpoint(path)
