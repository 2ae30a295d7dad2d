"""``mmlong mixers --draw``: who sees whom, as a picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError

DIM = 16

PICTURED: dict[str, dict[str, Any]] = {
    "adaptive_span": {"max_span": 16, "ramp": 4, "initial_span": 0.5},
    "bigbird": {"block": 4, "random": 1},
    "block_recurrent": {"window": 8, "states": 4},
    "clusterformer": {"clusters": 4, "chunk": 8},
    "compressive": {"segment": 8, "memory": 8, "compressed": 4, "exact": True},
    "dilated": {"segments": (16, 32, 64), "rates": (1, 2, 4)},
    "dsa": {"topk": 8},
    "etc": {"window": 4, "globals": 4},
    "expire_span": {"max_span": 16, "ramp": 4, "initial_span": 0.5},
    "h_transformer": {"block": 4},
    "image_local_1d": {"block": 8, "memory": 4},
    "image_local_2d": {"block": [2, 2], "memory": [2, 2]},
    "infini_attention": {"segment": 8},
    "linformer": {"rank": 8},
    "local": {"window": 4},
    "long_short": {"window": 4, "segment": 4, "rank": 2},
    "longformer": {"window": 4},
    "luna": {"packed": 8},
    "mega": {"chunk": 16},
    "memorizing": {"segment": 8, "near": 8, "topk": 4},
    "moba": {"block": 8, "topk": 2},
    "neighborhood_2d": {"kernel": 3},
    "neighborhood_3d": {"kernel": [3, 3, 3]},
    "nsa": {"compress": 8, "stride": 4, "block": 8, "blocks": 3, "window": 6},
    "nystromformer": {"landmarks": 8, "kernel_size": 5},
    "poolingformer": {"window": 4, "pooled_window": 16, "kernel": 3, "stride": 3},
    "reformer": {"rounds": 1, "chunk": 8},
    "routing": {"clusters": 4, "window": 8, "local_window": 8},
    "set_transformer": {"points": 8},
    "sinkhorn": {"block": 8},
    "sparse_fixed": {"stride": 8, "summary": 2},
    "sparse_strided": {"stride": 8},
    "swin_2d": {"window": 4, "shift": 2},
    "tcn": {"dilations": (1, 2, 4)},
    "titans": {"mini_batch": 16},
    "topk": {"topk": 6},
    "transformer_xl": {"segment": 8, "memory": 8, "exact": True},
}
"""Options by which a pattern that is laid out over thousands of tokens shows on 64."""


def draw_mixers(
    names: Sequence[str],
    out: Path,
    *,
    length: int,
    grid: tuple[int, int] | None,
    order: str,
    given: dict[str, dict[str, Any]],
) -> int:
    """Draw mixers on one page.

    Args:
        names: registered ones.
        out: the picture's file.
        length: tokens of a line.
        grid: for those that read one; its cells are then the length.
        order: its scan order.
        given: options of each mixer, before those that are chosen here.

    Returns:
        how many pictures there are: one for each form of each mixer.

    Raises:
        CommandError: a mixer cannot be built so, or does not take the length.
    """
    from mmlong.layout import Layout, scan_order
    from mmlong.measure.pattern import Picture, draw, seen_by
    from mmlong.mixers import MIXERS, create_mixer

    tokens = length if grid is None else grid[0] * grid[1]
    pictures: list[Picture] = []
    for name in names:
        traits = MIXERS[name].traits
        forms = [causal for causal in (True, False) if (traits.causal if causal else traits.bidirectional)]
        for causal in forms:
            options = {**sizes_of(MIXERS[name], tokens, grid), **PICTURED.get(name, {}), **given[name]}
            try:
                mixer = create_mixer(name, DIM, causal=causal, **options)
                rastered = grid is not None and (traits.grid or getattr(mixer, "width", None) == grid[1])
                layout = Layout(grid=grid, order=order) if grid is not None and traits.grid else None
                seen = seen_by(mixer, DIM, tokens, layout)
            except (ValueError, TypeError) as error:
                raise CommandError(f"{name} {options}: {error}; give it others with --option") from error
            cells = scan_order(grid, order if layout is not None else "raster") if rastered and grid else None
            title = name if len(forms) == 1 else f"{name}, {'causal' if causal else 'two-sided'}"
            pictures.append(Picture(title, seen, cells, grid if rastered else None))
    draw(pictures, out)
    return len(pictures)


def sizes_of(mixer: type, tokens: int, grid: tuple[int, int] | None) -> dict[str, int]:
    """Of a mixer's options those that say how long a sequence, or a row of a grid, is."""
    known = inspect.signature(mixer.__init__).parameters  # type: ignore[misc]
    sizes = {"max_length": tokens} | ({} if grid is None else {"width": grid[1]})
    return {name: n for name, n in sizes.items() if name in known}


def parse_grid(text: str) -> tuple[int, int]:
    """``8x8``."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise CommandError(f"--grid {text}: write ROWSxCOLUMNS, e.g. 8x8")
    return int(rows), int(columns)
