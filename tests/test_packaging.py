"""The wheel holds the whole tree and only `mmlong`, and works installed, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = {"configs": "mmlong/configs", "datamodules": "mmlong/datamodules", "experiments": "mmlong/experiments"}


def tree() -> set[str]:
    """What the wheel should hold, from the files of the checkout."""
    found = set()
    for folder in ("mmlong", *MAPPED):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            data = (
                path.suffix == ".yaml" or path.name == "py.typed" or (path.suffix == ".md" and folder == "experiments")
            )
            if "__pycache__" not in path.parts and (path.suffix == ".py" or data):
                found.add((Path(MAPPED.get(folder, folder)) / inside).as_posix())
    return found


def test_packages_are_listed() -> None:
    """The list in pyproject.toml is written by hand: every folder with an ``__init__.py`` must be in it."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = set()
    for folder in ("mmlong", *MAPPED):
        for path in (ROOT / folder).rglob("__init__.py"):
            there.add(
                (Path(MAPPED.get(folder, folder)) / path.parent.relative_to(ROOT / folder))
                .as_posix()
                .rstrip("/")
                .replace("/", ".")
            )
    assert listed == there


def test_the_wheel_is_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
        top = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("top_level.txt"))
    assert top.split() == ["mmlong"]
    assert held == tree()


@pytest.mark.slow
def test_installed_wheel_trains_a_debug_recipe_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    bin_folder = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    site = next((tmp_path / "env").rglob("site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Everything else is borrowed from here; a .pth line comes after the folder's own packages, so the wheel wins.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    away = tmp_path / "away"
    away.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MMLONG_DATA": str(tmp_path / "data")}
    environment.pop("PYTHONPATH", None)
    where = subprocess.run([bin_folder / "python", "-c", "import mmlong; print(mmlong.__file__)"], cwd=away, env=environment,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert str(site) in where.stdout
    run = subprocess.run(
        [bin_folder / "python", "-c", "import sys, mmlong.cli; sys.exit(mmlong.cli.main(sys.argv[1:]))", "fit", "-c", "image/mnist784", "-c",
         "image/mnist784.debug", "--trainer.max_steps=4"],
        cwd=away, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "784 tokens a sample" in run.stdout
    assert "test accuracy" in run.stdout
    folder = next((away / "runs").rglob("summary.json")).parent
    assert {
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "loss.png",
        "confusion.png",
        "predictions.png",
        "summary.json",
        "config.json",
        "model.safetensors",
    } <= {p.name for p in folder.iterdir()}
