"""The tables of the README in one command each: our mixers against their peers, how they grow, the default backbone's training step; and what was aimed at.

The aims are seconds on a machine whose fastest float32 product is ``REFERENCE`` FLOP/s. On another one they are scaled by its own, so that a slower or busier machine is not taken for slower code.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmlong.bench.contest import Subject, against
from mmlong.bench.report import Report
from mmlong.bench.rows import Row, growths
from mmlong.mixers import MIXERS

REFERENCE = 178e9
AT = 65536
"""Where the aims are."""
DIM = 256
GROWTH = {"n": 1.05, "n log n": 1.05, "n sqrt n": 1.55}
"""Of time, from the first length of a table to the last, by a mixer's cost."""
MEMORY_GROWTH = 1.05
STEP_SHARE = 0.5
STEP_BF16 = 1.5


@dataclass(frozen=True)
class Aim:
    """Forward and backward of one layer at ``AT`` tokens, ``DIM`` wide, float32.

    Attributes:
        mixer: ours.
        peer: in whose comparison; ``None`` for a mixer without a peer.
        seconds: of the shortest run on the reference machine; ``None``: any.
        memory: bytes above the baseline; ``None``: any.
        times: of the peer's shortest run, at most; ``None``: any.
    """

    mixer: str
    peer: str | None
    seconds: float | None = None
    memory: float | None = None
    times: float | None = None


@dataclass(frozen=True)
class Preset:
    """A table.

    Attributes:
        aims: who runs, in this order, and what was aimed at.
        lengths: tokens of a row.
        peer_length: peers run up to this length only.
        step: the default backbone's training step too.
        at: tokens at which the aims are, and up to which mixers run whose work is quadratic.
    """

    aims: tuple[Aim, ...]
    lengths: tuple[int, ...]
    peer_length: int
    step: bool
    at: int = AT


FIRST = (
    Aim("mamba2", "mamba2-transformers", 2.2, 2e9),
    Aim("local", "longformer", 3.5, 3e9),
    Aim("local", "local-attention", 2.0, 3e9),
    Aim("s4d", "s5", 2.0, 2.5e9),
    Aim("hyena", None, 2.5, 3e9),
)
STATE = (
    Aim("linear_transformer", "linear-attention-transformer", 1.5, 2e9),
    Aim("performer", "performer-pytorch", 2.5),
    Aim("performer", "performer-pytorch-two-sided", 2.5),
    Aim("lightning", "minimax", 2.0, 2e9),
    Aim("retnet", None, 2.0, 2e9),
    Aim("gla", None, 3.0),
    Aim("mlstm", "xlstm", 3.0),
    Aim("gated_deltanet", "qwen3-next", 3.0),
    Aim("kda", "kimi-linear", 4.0),
    Aim("mamba", "mambapy", 4.0, 3e9),
    Aim("s5", "s5-pytorch", 2.0),
    Aim("lru", None, 2.0),
    Aim("s4d", None, 2.0),
    Aim("mega", None, 2.5),
    Aim("rg_lru", None, 1.5),
    Aim("min_gru", None, 1.5),
    Aim("hgrn", None, 1.5),
)
SOFTMAX = (
    Aim("longformer", "longformer-globals", 3.5, 3e9),
    Aim("bigbird", "bigbird-transformers", 4.0, 3e9),
    Aim("reformer", "reformer-transformers", 5.0),
    Aim("reformer", "reformer-pytorch", 5.0),
    Aim("sinkhorn", "sinkhorn-transformer", 2.0),
    Aim("routing", "routing-transformer", 2.0),
    Aim("nystromformer", "nystrom-attention", 1.5),
    Aim("nystromformer", "nystromformer", 1.5),
    Aim("linformer", "linformer", 1.5),
    Aim("axial", "axial-attention", 2.0),
    Aim("h_transformer", "h-transformer-1d", 2.0),
    Aim("h_transformer", "h-transformer-1d-causal", 2.0),
    Aim("fnet", "fnet", 2.5),
    Aim("nsa", None),
    Aim("moba", None),
)
DENSE = (Aim("attention", "sdpa", times=1.1),)
PRESETS = {
    "first": Preset(FIRST, (16384, AT, 262144), AT, step=True),
    # Peers of minutes and tens of gigabytes at 65,536 tokens are met at a length where all of them run.
    "state": Preset(STATE, (16384, AT), 16384, step=False),
    "softmax": Preset(SOFTMAX, (16384, AT, 262144), AT, step=False),
    # Work is quadratic: one length says it.
    "dense": Preset(DENSE, (16384,), 16384, step=False, at=16384),
}


def contests(aims: tuple[Aim, ...]) -> list[list[Subject]]:
    """Who runs."""
    return [[Subject(aim.mixer)] if aim.peer is None else against(aim.mixer, aim.peer, {}) for aim in aims]


def verdicts(report: Report) -> list[tuple[str, str, str, bool]]:
    """Each aim that this report can answer: ``(what, aimed at, found, holds)``."""
    peak = report.peaks.get("gemm_fp32")
    said: list[tuple[str, str, str, bool]] = []
    preset = PRESETS[report.settings.get("preset", "first")]
    for aim in preset.aims:
        row = _row(report, aim, preset.at)
        if row is None or not row.best or peak is None:
            continue
        if aim.seconds is not None:
            seconds = aim.seconds * REFERENCE / peak
            what = f"{row.name}, {preset.at:,} tokens"
            said.append((what, f"{seconds:.2f} s", f"{row.best:.2f} s", row.best <= seconds))
        theirs = None if aim.times is None else _row(report, aim, preset.at, theirs=True)
        if aim.times is not None and theirs is not None and theirs.best:
            times = row.best / theirs.best
            what = f"{row.name} beside {aim.peer}, {preset.at:,} tokens"
            said.append((what, f"{aim.times:.2f} times its time", f"{times:.2f} times", times <= aim.times))
        if row.memory_bytes is not None and aim.memory is not None:
            found, memory = f"{row.memory_bytes / 1e9:.2f} GB", f"{aim.memory / 1e9:g} GB"
            said.append((f"{row.name}, memory", memory, found, row.memory_bytes <= aim.memory))
    costs = {row.name: MIXERS[row.settings["mixer"]].traits.cost for row in report.rows if row.kind == "mixer"}
    for g in growths(report.rows):
        if g.side == "ours" and g.mode == "both":
            which = f"from {g.lengths[0]:,} to {g.lengths[-1]:,}"
            which = which if g.against is None else f"{which} (beside {g.against})"
            most = GROWTH.get(costs.get(g.name, ""))
            if most is not None:
                what = f"{g.name}, growth {which}"
                said.append((what, f"length^{most}", f"length^{g.exponent:.2f}", g.exponent <= most))
            if g.memory is not None:
                what = f"{g.name}, growth of memory {which}"
                said.append((what, f"length^{MEMORY_GROWTH}", f"length^{g.memory:.2f}", g.memory <= MEMORY_GROWTH))
    steps = {row.dtype: row for row in report.rows if row.kind == "model" and row.best}
    if "fp32" in steps and (share := steps["fp32"].share(report.peaks)) is not None:
        name = f"{steps['fp32'].name}: training step"
        said.append((name, f"{STEP_SHARE:.0%} of GEMM", f"{share:.0%}", share >= STEP_SHARE))
        if "bf16" in steps:
            faster = (steps["fp32"].best or 0) / (steps["bf16"].best or 1)
            said.append((f"{name}, bf16 over fp32", f"{STEP_BF16} times", f"{faster:.2f} times", faster >= STEP_BF16))
    return said


def _row(report: Report, aim: Aim, at: int, theirs: bool = False) -> Row | None:
    for row in report.rows:
        if (
            row.settings.get("mixer") == aim.mixer
            and row.against == aim.peer
            and (row.side == "ours") != theirs
            and (row.dtype, row.mode, row.length, row.dim) == ("fp32", "both", at, DIM)
        ):
            return row
    return None
