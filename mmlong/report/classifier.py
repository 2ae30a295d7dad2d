"""What a page says of a classifier: which class is taken for which, and whether its probabilities can be believed."""

from __future__ import annotations

from collections.abc import Sequence

from mmlong.report.calibration import Prediction, confusion, expected_calibration_error, reliability
from mmlong.report.curves import reliability_chart
from mmlong.report.elements import Content, Markup, details, join, table, tag

MATRIX = 40
"""Classes up to which the whole matrix is shown; of more, the pairs that are confused most."""
PAIRS = 25


def confusion_table(predictions: Sequence[Prediction], names: Sequence[str]) -> Markup:
    """Counts of truth against prediction, shaded by the share of the row."""
    ordered, counts = confusion(predictions, names)
    right = sum(counts[i][i] for i in range(len(ordered)))
    said = f"Confusion matrix: {right:,} of {len(predictions):,} right; rows are the truth, columns what was said, shades the share of the row"
    if len(ordered) > MATRIX:
        return join(tag("p", f"{len(ordered)} classes; the whole matrix is not shown."), _pairs(ordered, counts))
    rows: list[list[Content]] = []
    for i, name in enumerate(ordered):
        total = max(sum(counts[i]), 1)
        cells = [
            tag("td", counts[i][j], style=f"--share:{100 * counts[i][j] / total:.0f}", class_="hit" if i == j else None)
            for j in range(len(ordered))
        ]
        rows.append([name, *cells])
    return table(said, ["truth", *ordered], rows, class_="matrix")


def _pairs(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    pairs = [(c, names[i], names[j]) for i, row in enumerate(counts) for j, c in enumerate(row) if i != j and c]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows: list[list[Content]] = [[truth, said, count] for count, truth, said in pairs[:PAIRS]]
    return table(f"The {len(rows)} pairs that are confused most, of {len(pairs)}", ["truth", "said", "times"], rows)


def per_class(predictions: Sequence[Prediction], names: Sequence[str]) -> Markup:
    """Recall and precision of each class."""
    ordered, counts = confusion(predictions, names)
    rows: list[list[Content]] = []
    for i, name in enumerate(ordered):
        there, said, hit = sum(counts[i]), sum(row[i] for row in counts), counts[i][i]
        rows.append(
            [
                name,
                there,
                f"{hit / there:.1%}" if there else "none there",
                f"{hit / said:.1%}" if said else "never said",
            ]
        )
    return details(
        "Class by class",
        table("Each class", ["class", "samples", "found (recall)", "right when said (precision)"], rows),
    )


def calibration(predictions: Sequence[Prediction]) -> Markup:
    """ECE in a sentence, the chart, and its table."""
    bins = reliability(predictions)
    error = expected_calibration_error(bins)
    total = len(predictions)
    sure = sum(p.probability for p in predictions) / total
    right = sum(p.truth == p.prediction for p in predictions) / total
    lean = "too sure of itself" if sure > right else "less sure than it could be"
    sentence = (
        f"Expected calibration error {error:.4f} ({len(bins)} bins): it is {sure:.1%} sure on average and right {right:.1%} of the time"
        f"{'.' if abs(sure - right) < 0.005 else f', so {lean}.'}"
    )
    few = None
    if total < 200:
        few = tag(
            "p",
            f"Of {total} predictions this is a rough number: ECE of few samples is too large by chance alone.",
            class_="soft",
        )
    rows: list[list[Content]] = [
        [f"{b.low:.0%} to {b.high:.0%}", b.count, f"{b.confidence:.1%}", f"{b.accuracy:.1%}"] for b in bins if b.count
    ]
    told = table("Reliability", ["said", "predictions", "said on average", "right"], rows)
    return join(
        tag("p", sentence),
        few,
        tag("div", reliability_chart(bins, "reliability"), class_="charts"),
        details("Bin by bin", told),
    )
