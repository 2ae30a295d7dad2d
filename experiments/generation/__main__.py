"""What one token costs after a long past: time and state, for every registered mixer that streams.

``python -m mmlong.experiments.generation [MIXER ...] [--dim 128] [--depth 4] [--past 1024 8192 65536] [--tokens 64]``

A byte model with random weights reads a past of each length in pieces and then draws tokens one by one, as ``mmlong generate`` does. Where the state is constant both columns stay flat.
"""

from __future__ import annotations

import sys
import time

import torch
from mmlong.experiments.command import experiment_parser
from rich.console import Console
from rich.table import Table

from mmlong.generation import read
from mmlong.heads import Sampling
from mmlong.mixers import MIXERS, list_mixers, state_bytes
from mmlong.models import AutoregressiveModel, build_model


def measure(model: AutoregressiveModel, past: int, tokens: int) -> tuple[float, int]:
    """(seconds a token, bytes of state) after ``past`` random bytes; the fastest of three stretches."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(256, (1, past), generator=draw)
    with torch.inference_mode():
        state = read(model, prompt)
        best = float("inf")
        for _ in range(3):
            begun = time.perf_counter()
            for _ in range(tokens):
                prediction, state = model.peek(state)
                state = model.put(state, model.head.sample(prediction, Sampling(), draw))
            best = min(best, (time.perf_counter() - begun) / tokens)
    return best, state_bytes(state["backbone"])


def main(argv: list[str] | None = None) -> int:
    """Command line; prints a table, a line as each is measured."""
    parser = experiment_parser("generation", __doc__)
    streaming = [name for name in list_mixers() if MIXERS[name].traits.causal and MIXERS[name].traits.streaming]
    parser.add_argument("mixers", nargs="*", metavar="MIXER", default=streaming, help="default: all that stream")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--past", type=int, nargs="+", default=[1024, 8192, 65536])
    parser.add_argument("--tokens", type=int, default=64, help="tokens timed, three times")
    args = parser.parse_args(argv)
    table = Table(title=f"one token, dim {args.dim}, depth {args.depth}, float32, {torch.get_num_threads()} threads")
    table.add_column("mixer")
    for past in args.past:
        table.add_column(f"ms after {past:,}", justify="right")
        table.add_column("state MB", justify="right")
    for name in args.mixers:
        torch.manual_seed(0)
        model = build_model(
            {
                "kind": "autoregressive", "modality": {"name": "text"}, "head": {},
                "backbone": {"dim": args.dim, "depth": args.depth, "mixers": [name]},
            }
        )  # fmt: skip
        assert isinstance(model, AutoregressiveModel)
        cells = []
        for past in args.past:
            seconds, size = measure(model.eval(), past, args.tokens)
            cells += [f"{seconds * 1000:.2f}", f"{size / 1e6:.3f}"]
            print(f"{name}, past {past:,}: {seconds * 1000:.2f} ms a token, state {size / 1e6:.3f} MB", flush=True)
        table.add_row(name, *cells)
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
