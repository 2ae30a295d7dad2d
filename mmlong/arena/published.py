"""What is published of the Long Range Arena, in per cent, for a table to stand beside one's own numbers.

The first rows are the benchmark's own leaderboard (Tay et al. 2021, arXiv 2011.04006), under one training budget; the others are of later papers, each tuned by its authors. They do not compare with runs of another budget, size or data, and among themselves with care:

- the leaderboard's mean leaves Path-X out; papers of the state-space line count a failed Path-X as 50 in some rows and not in others, so no mean is given here;
- tuning alone moves a dense Transformer from 54.4 to 59.2 (Mega's Table 2), and training on the task's own inputs first moves it to the level of S4 (Amos et al. 2023, arXiv 2310.02980);
- `image` is CIFAR-10 in grey levels; sequential CIFAR is in colour;
- `text` and `retrieval` are validated on what they are tested on in the benchmark's own code (`text`), or on a split of their own (`retrieval`);
- Path-256 is no task of the benchmark; what is known of it is from FlashAttention (Dao et al. 2022), block-sparse.

``None``: not reported; ``"x"``: reported to fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Number = float | str | None


@dataclass(frozen=True)
class Published:
    """A row.

    Attributes:
        system: its name.
        source: where the numbers stand.
        mixer: what it is called here, where it is one mixer of this library; else empty.
        accuracy: in per cent by task, without ``lra/``.
    """

    system: str
    source: str
    mixer: str = ""
    accuracy: dict[str, Number] = field(default_factory=dict)


_TASKS = ("listops", "text", "retrieval", "image", "pathfinder32", "pathfinder128", "pathfinder256")
_LEADERBOARD = "Tay et al. 2021"


def _row(system: str, source: str, mixer: str, *values: Number) -> Published:
    return Published(system, source, mixer, {k: v for k, v in zip(_TASKS, values, strict=False) if v is not None})


PUBLISHED: tuple[Published, ...] = (
    _row("Local", _LEADERBOARD, "local", 15.82, 52.98, 53.39, 41.46, 66.63, "x"),
    _row("Linear Transformer", _LEADERBOARD, "linear_transformer", 16.13, 65.90, 53.09, 42.34, 75.30, "x"),
    _row("Reformer", _LEADERBOARD, "reformer", 37.27, 56.10, 53.40, 38.07, 68.50, "x"),
    _row("Sparse Transformer", _LEADERBOARD, "sparse_strided", 17.07, 63.58, 59.59, 44.24, 71.71, "x"),
    _row("Sinkhorn", _LEADERBOARD, "sinkhorn", 33.67, 61.20, 53.83, 41.23, 67.45, "x"),
    _row("Linformer", _LEADERBOARD, "linformer", 35.70, 53.94, 52.27, 38.56, 76.34, "x"),
    _row("Performer", _LEADERBOARD, "performer", 18.01, 65.40, 53.82, 42.77, 77.05, "x"),
    _row("Synthesizer", _LEADERBOARD, "synthesizer_dense", 36.99, 61.68, 54.67, 41.61, 69.45, "x"),
    _row("Longformer", _LEADERBOARD, "longformer", 35.63, 62.85, 56.89, 42.22, 69.71, "x"),
    _row("Transformer", _LEADERBOARD, "attention", 36.37, 64.27, 57.46, 42.44, 71.40, "x"),
    _row("BigBird", _LEADERBOARD, "bigbird", 36.05, 64.02, 59.29, 40.83, 74.87, "x"),
    _row("FNet", "Liquid-S4, Table 1", "fnet", 35.33, 65.11, 59.61, 38.67, 77.80, "x"),
    _row("Nystromformer", "Liquid-S4, Table 1", "nystromformer", 37.15, 65.52, 79.56, 41.58, 70.94, "x"),
    _row("Luna-256", "Liquid-S4, Table 1", "luna", 37.25, 64.57, 79.29, 47.38, 77.72, "x"),
    _row("H-Transformer-1D", "Liquid-S4, Table 1", "h_transformer", 49.53, 78.69, 63.99, 46.05, 68.78, "x"),
    _row("Transformer, tuned again", "Mega, Table 2", "attention", 37.11, 65.21, 79.14, 42.94, 71.83, "x"),
    _row("Transformer, FlashAttention", "Dao et al. 2022", "attention", None, None, None, None, None, 61.4),
    _row("Transformer, block-sparse", "Dao et al. 2022", "", None, None, None, None, None, 56.0, 63.1),
    _row("DSS", "Liquid-S4, Table 1", "", 57.6, 76.6, 87.6, 85.8, 84.1, 85.0),
    _row("S4, version 1", "Liquid-S4, Table 1", "", 58.35, 76.02, 87.09, 87.26, 86.05, 88.10),
    _row("S4-LegS", "Liquid-S4, Table 1", "s4", 59.60, 86.82, 90.90, 88.65, 94.20, 96.35),
    _row("S4D-LegS", "Liquid-S4, Table 1", "", 60.47, 86.18, 89.46, 88.19, 93.06, 91.95),
    _row("S4D-Inv", "Liquid-S4, Table 1", "s4d", 60.18, 87.34, 91.09, 87.83, 93.78, 92.80),
    _row("Mega-chunk", "Mega, Table 2", "", 58.76, 90.19, 90.97, 85.80, 94.41, 93.81),
    _row("Liquid-S4", "its own", "", 62.75, 89.02, 91.20, 89.50, 94.8, 96.66),
    _row("S5", "its own", "s5", 62.15, 89.31, 91.40, 88.00, 95.33, 98.58),
    _row("Mega", "Mega, Table 2", "mega", 63.14, 90.43, 91.25, 90.44, 96.01, 97.98),
)
"""In the order of their sources."""
