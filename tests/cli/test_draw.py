"""``mmlong mixers --draw``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmlong.cli.draw import PICTURED, sizes_of
from mmlong.mixers import MIXERS, create_mixer

Call = Callable[..., tuple[int, str]]


def test_pictures_of_mixers(mmlong: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = mmlong("mixers", "--draw", "swin_2d", "--grid", "4x6", "--order", "hilbert")
    assert status == 0, said
    assert "1 pattern of 1 mixer in swin_2d.png" in said
    with Image.open("swin_2d.png") as one:
        assert one.size[0] > one.size[1], "a matrix and a grid"
    status, said = mmlong(
        "mixers",
        "--draw",
        "local",
        "lo*",
        "gru",
        "--length",
        "24",
        "--option",
        "local.window=3",
        "--out",
        "some/of.png",
    )
    assert status == 0, said
    assert "mixers in some/of.png" in said
    assert Path("some/of.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--draw", "locl"], "did you mean 'local'"),
        (["--draw", "local", "--grid", "8by8"], "ROWSxCOLUMNS"),
        (["--draw", "local", "--option", "window"], "KEY=VALUE"),
        (["--draw", "local", "--option", "gru.x=1"], "'gru' is not drawn"),
        (["--draw", "local", "--option", "window=0"], "window must be at least 1"),
        (["--draw", "swin_2d", "--order", "snake"], "unknown scan order"),
    ],
)
def test_what_cannot_be_drawn(mmlong: Call, words: list[str], told: str) -> None:
    status, said = mmlong("mixers", *words)
    assert status != 0
    assert told in said


def test_sizes_and_chosen_options() -> None:
    assert sizes_of(MIXERS["axial_decoder"], 48, (8, 6)) == {"width": 6}
    assert sizes_of(MIXERS["hyena"], 48, None) == {"max_length": 48}
    assert sizes_of(MIXERS["attention"], 48, (8, 6)) == {}
    for name, options in PICTURED.items():
        create_mixer(name, 16, causal=MIXERS[name].traits.causal, **options)
