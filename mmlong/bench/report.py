"""A report: rows, the machine they were measured on and how; kept as JSON, shown as a table, drawn as curves over the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mmlong.bench.rows import Growth, Row, growths, ratio
from mmlong.results import read_json, write_json

FORMAT = 1


class BadReportError(ValueError):
    """A file that is no report; the message says which and why."""


@dataclass
class Report:
    """What a run of ``mmlong bench`` found.

    Attributes:
        command: the words of the command.
        settings: what it was told or left to itself.
        machine: which machine and software (:func:`mmlong.measure.machine.describe`), and ``peaks``, the best of what was measured before and after: ``gemm_fp32``, ``gemm_bf16`` in FLOP/s,
            ``copy`` in bytes/s; ``peaks_measured`` has both measurements.
        rows: the results.
        streams: results of :mod:`mmlong.bench.stream`, plain values.
    """

    command: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)

    @property
    def peaks(self) -> dict[str, float]:
        """The machine's own best."""
        return self.machine.get("peaks", {})

    @property
    def failures(self) -> list[str]:
        """What each thing that failed said."""
        rows = [
            f"{r.name}, {r.side}, {r.length:,} tokens, {r.dtype}, {r.mode}: {r.failed}" for r in self.rows if r.failed
        ]
        return rows + [f"{s['name']}: {s['failed']}" for s in self.streams if s.get("failed")]

    def save(self, path: Path) -> None:
        """Write JSON, with ratios, shares and growth beside what they were made of."""
        rows = [
            {**row.as_dict(), "ratio": ratio(row, self.rows), "share_of_gemm_peak": row.share(self.peaks)}
            for row in self.rows
        ]
        content = {
            "format": FORMAT, "command": self.command, "settings": self.settings, "machine": self.machine,
            "rows": rows, "growth": [asdict(g) for g in growths(self.rows)], "streams": self.streams,
        }  # fmt: skip
        write_json(path, content)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            BadReportError: it is not there, or is no report.
        """
        return read_json(path, "report of mmlong bench", cls._of, BadReportError, FORMAT)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Report:
        made = ("ratio", "share_of_gemm_peak")
        rows = [Row.from_dict({k: v for k, v in row.items() if k not in made}) for row in content["rows"]]
        return cls(content["command"], content["settings"], content["machine"], rows, content["streams"])


def machine_line(machine: dict[str, Any]) -> str:
    """Which machine, and what it can do, in a line."""
    peaks = machine.get("peaks", {})
    said = [
        f"{machine['processor']}" if not machine.get("gpu") else str(machine["gpu"]),
        f"{machine['threads']} threads",
    ]
    said += [
        f"GEMM {key.removeprefix('gemm_')} {value / 1e9:,.0f} GFLOP/s" for key, value in peaks.items() if "gemm" in key
    ]
    if "copy" in peaks:
        said.append(f"copy {peaks['copy'] / 1e9:.1f} GB/s")
    said.append(f"torch {machine['versions'].get('torch', '?')}")
    if machine.get("commit"):
        said.append(f"commit {machine['commit']}")
    return ", ".join(said)


def _or(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def table(report: Report) -> Table:
    """The rows, for people. A peer's row has the ratio of its time to ours."""
    made = Table(box=None, pad_edge=False, title=None)
    for column, justify in (
        ("what", "left"), ("side", "left"), ("tokens", "right"), ("dim", "right"), ("dtype", "left"), ("mode", "left"),
        ("min s", "right"), ("median s", "right"), ("GB", "right"), ("tokens/s", "right"), ("of GEMM", "right"), ("times ours", "right"),
    ):  # fmt: skip
        made.add_column(column, justify=justify, no_wrap=column != "what")  # type: ignore[arg-type]
    for row in report.rows:
        size = f"{row.length:,}" if row.batch == 1 else f"{row.batch} x {row.length:,}"
        if row.failed and not row.seconds:
            first = row.failed.split("\n")[0]
            made.add_row(
                row.name, row.side, size, str(row.dim), row.dtype, row.mode, first if len(first) < 20 else "failed"
            )
            continue
        made.add_row(
            row.name, row.side, size, str(row.dim), row.dtype, row.mode, _or(row.best, ".3g"), _or(row.median, ".3g"),
            _or(row.memory_bytes, ".2f", 1e-9), _or(row.tokens / row.best if row.best else None, ",.0f"),
            _or(row.share(report.peaks), ".0%"), _or(ratio(row, report.rows), ".2f"),
        )  # fmt: skip
    return made


def stream_table(streams: Sequence[dict[str, Any]]) -> Table:
    """Streams, for people: microseconds a token in the first, the middle and the last window, and what they are spent on (:mod:`mmlong.bench.stream`)."""
    made = Table(box=None, pad_edge=False)
    for column in (
        "model", "dim", "depth", "tokens", "us first", "us middle", "us last", "operators", "outside them", "fixed",
        "us of 64 rows", "state MB", "apart",
    ):  # fmt: skip
        made.add_column(column, justify="left" if column == "model" else "right")
    for s in streams:
        size = (str(s["dim"]), str(s["depth"]), f"{s['tokens']:,}")
        if s.get("failed"):
            made.add_row(s["name"], *size, "failed")
            continue
        us = s["microseconds"]
        made.add_row(
            s["name"], *size, *(f"{us[i]:,.0f}" for i in (0, len(us) // 2, -1)), f"{s['operators']:,.0f}",
            f"{s['outside_share']:.0%}", f"{s['fixed_share']:.0%}", f"{s['batch_microseconds']:,.0f}",
            f"{s['state_bytes'] / 1e6:.3f}", _or(s.get("difference"), ".1g"),
        )  # fmt: skip
    return made


def growth_lines(found: Sequence[Growth]) -> list[str]:
    """How time and memory grow with the length, a line each."""
    return [
        f"{g.name}, {g.side}, {g.dtype}, {g.mode}: time grows as length^{g.exponent:.2f}"
        + ("" if g.memory is None else f", memory as length^{g.memory:.2f},")
        + f" from {g.lengths[0]:,} to {g.lengths[-1]:,}"
        for g in found
    ]


def plot(report: Report, path: Path) -> None:
    """Seconds and GB against the length, both axes logarithmic; for streams, microseconds a token over the tokens before it.

    Raises:
        ValueError: nothing was measured that could be drawn.
    """
    lines: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.best:
            label = f"{row.name} {row.mode} {row.dtype}"
            lines.setdefault(label if row.side == "ours" else f"{row.side} {row.mode} {row.dtype}", []).append(row)
    streams = [s for s in report.streams if not s.get("failed")]
    if not lines and not streams:
        raise ValueError("there is nothing to draw: no measurement succeeded")
    import matplotlib
    import matplotlib.figure

    panels = 2 * bool(lines) + bool(streams)
    figure = matplotlib.figure.Figure(figsize=(5.5 * panels, 5.5), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    colours = matplotlib.colormaps["tab20"]
    for axis in axes:
        axis.set_prop_cycle(color=[colours(i) for i in (*range(0, 20, 2), *range(1, 20, 2))])
    if lines:
        seconds, memory = axes[:2]
        for label, rows in lines.items():
            rows = sorted(rows, key=lambda r: r.length)
            style = {
                "marker": "o" if rows[0].side == "ours" else "x",
                "linestyle": "-" if rows[0].side == "ours" else "--",
            }
            xs = [r.length for r in rows]
            seconds.plot(xs, [r.best for r in rows], label=label, **style)
            memory.plot(xs, [(r.memory_bytes or 0) / 1e9 or None for r in rows], label=label, **style)
        for axis, name in ((seconds, "seconds"), (memory, "GB")):
            axis.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel=name)
            lengths = sorted({row.length for rows in lines.values() for row in rows})
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="x-small")
    if streams:
        for stream in streams:
            us = stream["microseconds"]
            xs = [stream["window"] * (i + 1) for i in range(len(us))]
            axes[-1].plot(xs, us, label=stream["name"])
        axes[-1].set(xlabel="tokens before", ylabel="microseconds a token", ylim=(0, None))
        axes[-1].legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
