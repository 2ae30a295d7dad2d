"""The parts of pages: elements, settings, calibration against torchmetrics, charts, and contrasts of the style."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from mmlong.report.calibration import Prediction, confusion, expected_calibration_error, reliability
from mmlong.report.curves import Line, chart, number, thinned, ticks
from mmlong.report.elements import Markup, join, table, tag
from mmlong.report.settings import changed, differing
from mmlong.report.style import DARK, LIGHT


def test_text_is_escaped_once_and_markup_not_again() -> None:
    assert tag("p", "a < b & c", tag("b", '"')) == "<p>a &lt; b &amp; c<b>&quot;</b></p>"
    assert tag("img", alt='"><x>', src="data:,") == '<img alt="&quot;&gt;&lt;x&gt;" src="data:,">'
    assert join(["x", None, 3], Markup("<i>")) == "x3<i>"
    assert tag("p", "\x00\ud800\t") == "<p>\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\t</p>"
    with pytest.raises(ValueError, match="<img> holds nothing"):
        tag("img", "text")
    assert 'aria-label="&lt;x&gt;"' in table("<x>", [], [["a", "b"]])


def test_calibration_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    chances = torch.softmax(2 * torch.randn(500, 4, generator=generator), -1)
    truth = torch.randint(4, (500,), generator=generator)
    sure, said = chances.max(-1)
    rows = [
        Prediction(i, str(int(t)), str(int(s)), float(p))
        for i, (t, s, p) in enumerate(zip(truth, said, sure, strict=True))
    ]
    theirs = MulticlassCalibrationError(4, n_bins=15, norm="l1")(chances, truth)
    assert expected_calibration_error(reliability(rows)) == pytest.approx(float(theirs), abs=1e-6)
    names, counts = confusion(rows, ["0", "1", "2", "3"])
    assert names == ["0", "1", "2", "3"]
    assert sum(map(sum, counts)) == 500
    assert counts[1][2] == int(((truth == 1) & (said == 2)).sum())


def test_edges_of_bins() -> None:
    bins = reliability([Prediction(0, "a", "a", 0.0), Prediction(1, "a", "b", 1.0), Prediction(2, "a", "a", 0.2)], 5)
    assert [b.count for b in bins] == [2, 0, 0, 0, 1]
    assert bins[0].accuracy == 1
    assert expected_calibration_error([]) == 0


def test_what_differs_from_a_recipe() -> None:
    base = {"a": {"init_args": {"x": 1, "y": [1, "1e-3"]}}, "gone": True}
    ran = {"a": {"init_args": {"x": 1.0, "y": [1, 0.001], "z": 5, "of": {"u": 1, "v": 2}}}, "recipe": "r"}
    assert changed(base, [], [], ran) == [("gone", "true", "(not set)")]
    assert changed(base, [{"a": {"init_args": {"z": 5}}}], [], ran)[0] == ("a.z", "(not set)", "5")
    assert ("a.of.u", "(not set)", "1") in changed(base, [], ["--a.init_args.of", "{u: 1}"], ran)
    assert differing([{"a": 1, "b": "1e-3"}, {"a": 2, "b": 0.001, "c": None}]) == [
        ("a", ["1", "2"]),
        ("c", ["(not set)", "null"]),
    ]


def test_thinning_keeps_spikes_ends_and_order() -> None:
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= 302
    assert (4321.0, 9.0) in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)
    assert thinned(points[:10]) == points[:10]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.0), (1e-5, 3e-5), (5.0, 5.0), (0, 1.5e9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 11
    span = (high - low) or 1
    assert all(low - 1e-6 * span <= t <= high + 1e-6 * span for t in found)


def test_a_chart_of_odd_numbers() -> None:
    assert chart([Line("a", [], []), Line("b", [1], [float("nan")])], "c", "t") is None
    for values in ([1.0], [2.0, 2.0], [1.0, float("inf"), 3.0], [-1e30, 1e30], [0.0, 0.0]):
        drawn = chart([Line("<a>", list(range(len(values))), values)], "c", "t")
        assert drawn is not None
        assert "nan" not in drawn
        assert "inf" not in drawn
        assert "&lt;a&gt;" in drawn
    assert number(1234567) == "1,234,567"
    assert number(0.123456) == "0.1235"


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_contrasts_are_those_of_wcag_aa(name: str) -> None:
    colours = {"light": LIGHT, "dark": DARK}[name]
    assert set(LIGHT) == set(DARK)
    for ground in ("paper", "card"):
        for text in ("ink", "soft", "link", "good", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for line in (f"c{n}" for n in range(8)):
            assert contrast(colours[line], colours[ground]) >= 3, (line, ground)
    assert contrast(colours["ink"], colours["heat"]) >= 4.5
