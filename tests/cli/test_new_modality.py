"""``mmlong new-modality``: what it writes, and what it refuses to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmlong.cli.errors import CommandError
from mmlong.cli.new_modality import write_modality
from mmlong.modalities import MODALITIES
from mmlong.testing import MODALITY_PROPERTY_NAMES, check_modality

MOST_LINES = 100


def test_what_is_written_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODALITIES, "_entries", {name: MODALITIES[name] for name in MODALITIES.names()})
    files = {path.name: path.read_text() for path in write_modality("side_scan", tmp_path / "new")}
    assert set(files) == {
        "pyproject.toml", "__init__.py", "modality.py", "waves.yaml", "waves.debug.yaml", "test_side_scan.py"
    }  # fmt: skip
    assert not [
        name
        for name, text in files.items()
        if "@" in text.replace("@register", "").replace("@class", "").replace("@pytest", "")
    ]
    source = files["modality.py"]
    assert len(source.splitlines()) < MOST_LINES
    exec(compile(source, "modality.py", "exec"), {"__name__": "written"})
    assert MODALITIES["side_scan"].__name__ == "SideScanModality"
    assert set(check_modality("side_scan")) == set(MODALITY_PROPERTY_NAMES) - {"set"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mmlong_radar").mkdir()
    (tmp_path / "mmlong_radar" / "modality.py").write_text("mine")
    with pytest.raises(CommandError, match="modality.py is there already; nothing was written: give another --folder"):
        write_modality("radar", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["modality.py"]
    assert (tmp_path / "mmlong_radar" / "modality.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("audio", r"'audio' is there already \(mmlong.modalities.audio.AudioModality\)"),
        ("Radar", "'Radar' cannot name a modality: small letters"),
        ("2d", "'2d' cannot name a modality"),
        ("a b", "'a b' cannot name a modality"),
        ("../x", "cannot name a modality"),
        ("class", "'class' cannot name a modality"),
    ],
)
def test_names_that_cannot_be(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=said):
        write_modality(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    with pytest.raises(CommandError, match="cannot be written"):
        write_modality("radar", tmp_path / "new")


def test_the_command_says_what_comes_next(
    tmp_path: Path, mmlong: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = mmlong("new-modality", "side_scan")
    assert status == 0
    assert "pip install -e mmlong-side-scan" in said
    assert "mmlong fit -c side_scan/waves" in said
    assert Path("mmlong-side-scan", "mmlong_side_scan", "waves.yaml").is_file()
