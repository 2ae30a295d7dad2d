from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlong.tasks.views import VIEWS, Views

KINDS = [(kind, name) for kind, views in VIEWS.items() for name in views]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def example(kind: str, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    draw = torch.Generator().manual_seed(7)
    if kind == "image":
        return torch.randint(256, (3, channels, 7, 9), dtype=torch.uint8, generator=draw), None
    lengths = torch.tensor([21, 8, 1])
    if kind == "audio":
        raw = torch.rand(3, channels, 21, generator=draw) * 2 - 1
        raw = torch.where(torch.arange(21) < lengths[:, None, None], raw, 0)
        return (raw if channels > 1 else raw[:, 0]), lengths
    raw = torch.randint(65, 91, (3, 21), dtype=torch.uint8, generator=draw)
    return torch.where(torch.arange(21) < lengths[:, None], raw, 0), lengths


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_view_keeps_the_form_and_depends_on_the_row_and_its_generator_alone(
    kind: str, name: str, channels: int
) -> None:
    raw, lengths = example(kind, channels)
    before = raw.clone()
    view = Views(kind, [name])
    found, kept = view(raw, lengths, generators(1, 2, 3))
    assert torch.equal(raw, before), "in place of nothing"
    assert found.dtype == raw.dtype
    assert found.shape == raw.shape
    assert (kept is None) == (lengths is None)
    for row in range(3):
        alone, length = view(
            raw[row : row + 1], None if lengths is None else lengths[row : row + 1], generators(row + 1)
        )
        torch.testing.assert_close(found[row], alone[0])
        assert kept is None or length is None or int(kept[row]) == int(length[0])
    others = [view(raw, lengths, generators(n, n + 1, n + 2))[0] for n in range(10, 22)]
    assert any(not torch.equal(found, other) for other in others)
    if kept is not None:
        assert lengths is not None
        assert bool(((kept >= 1) & (kept <= lengths)).all())
        for row, length in enumerate(kept.tolist()):
            assert not found[row, ..., length:].any(), "padding stays empty"


@pytest.mark.parametrize("kind", ["audio", "genome", "text"])
def test_a_stretch_is_a_stretch_of_the_row(kind: str) -> None:
    raw, lengths = example(kind)
    assert lengths is not None
    starts = set()
    for seed in range(40):
        found, kept = Views(kind, ["crop:0.3"])(raw, lengths, generators(seed, seed + 1, seed + 2))
        assert kept is not None
        for row in range(3):
            length, full = int(kept[row]), int(lengths[row])
            assert round(0.3 * full) <= length <= full or length == 1
            at = [s for s in range(full - length + 1) if torch.equal(raw[row, s : s + length], found[row, :length])]
            assert at, (seed, row)
            starts.add((row, at[0]))
    assert len({at for row, at in starts if row == 0}) > 5
    whole, kept = Views(kind, ["crop:1"])(raw, None, generators(1, 2, 3))
    assert torch.equal(whole, raw)
    assert kept is not None
    assert kept.tolist() == [21, 21, 21]


def test_what_each_view_does() -> None:
    image, _ = example("image", 3)
    flips = [
        torch.equal(Views("image", ["flip"])(image, None, generators(n, 0, 0))[0][0], image[0].flip(-1))
        for n in range(40)
    ]
    assert 8 < sum(flips) < 32
    whole, _ = Views("image", ["crop:1"])(image[:1], None, generators(4))
    assert whole.shape == (1, 3, 7, 9)
    even = torch.full((2, 1, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(Views("image", ["crop"])(even, None, generators(1, 2))[0], even), "stretched, not darkened"
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 1, 64, 64).contiguous()
    part = Views("image", ["crop:0.2"])(ramp, None, generators(3))[0][0, 0]
    step = part[:, 1:].float() - part[:, :-1].float()
    assert bool((step >= 0).all()), "a part of a ramp is a ramp, and no wider range"
    assert int(part.max()) - int(part.min()) < 60
    sound, lengths = example("audio")
    louder, _ = Views("audio", ["gain:6"])(sound, lengths, generators(1, 2, 3))
    ratio = louder[0] / sound[0]
    torch.testing.assert_close(ratio, ratio[:1].expand(21))
    assert 0.5 < float(ratio[0]) < 2.0
    long = torch.sin(torch.arange(20_000) / 9.0)[None] * 0.3
    noise = Views("audio", ["noise:0.1"])(long, None, generators(5))[0] - long
    assert float(noise.std()) == pytest.approx(0.1 * 0.3 / 2**0.5, rel=0.03)
    assert torch.equal(Views("audio", ["polarity"])(sound, lengths, generators(1, 2, 3))[0].abs(), sound.abs())


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("image", ["krop"], r"no view 'krop' \(did you mean 'crop'\?\)"),
        ("image", ["noise:loud"], "the amount 'loud' is not a number"),
        ("image", ["noise:-1"], "out of range"),
        ("image", ["crop:1.5"], "out of range"),
        ("points", None, "no views of points"),
    ],
)
def test_wrong_views_are_named(kind: str, names: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Views(kind, names)
