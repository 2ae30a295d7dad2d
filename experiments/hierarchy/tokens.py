"""What a drawn token costs in trained models of bytes, side by side: ``python -m mmlong.experiments.hierarchy.tokens RUN RUN ... [--prompt FILE] [--tokens 256] [--rounds 4]``

Each model reads the same text and then draws tokens one by one, as ``mmlong generate`` does, in turns. CPU time of one thread, so that other work on the machine counts less; the least of all rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from mmlong.generation import read
from mmlong.heads import Sampling
from mmlong.models import AutoregressiveModel, load_model


def draw(model: AutoregressiveModel, prompt: torch.Tensor, tokens: int, seed: int) -> float:
    """CPU seconds a token, after the codes ``prompt (1, L)``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        state = read(model, prompt)
        begun = time.process_time()
        for _ in range(tokens):
            prediction, state = model.peek(state)
            state = model.put(state, model.head.sample(prediction, Sampling(), generator))
        return (time.process_time() - begun) / tokens


def main(argv: list[str] | None = None) -> int:
    """Command line; a line a run."""
    parser = argparse.ArgumentParser(
        prog="python -m mmlong.experiments.hierarchy.tokens", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs of models of bytes")
    parser.add_argument("--prompt", type=Path, help="what is read first: its last 4,096 bytes (default: this file)")
    parser.add_argument("--tokens", type=int, default=256, help="drawn in a round")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.rounds < 1:
        parser.error("--tokens and --rounds are at least 1")
    torch.set_num_threads(1)
    try:
        models = {run: load_model(run) for run in args.runs}
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    for run, model in models.items():
        if not isinstance(model, AutoregressiveModel) or model.modality.codes != 256:
            parser.error(f"{run} holds no model that draws bytes")
    text = (args.prompt or Path(__file__)).read_bytes()[-4096:]
    if not text:
        parser.error(f"{args.prompt} is empty")
    prompt = torch.tensor([list(text)])
    seconds: dict[Path, list[float]] = {run: [] for run in models}
    for turn in range(args.rounds):
        for run, model in models.items():
            assert isinstance(model, AutoregressiveModel)
            seconds[run].append(draw(model.eval(), prompt, args.tokens, turn))
    for run, found in seconds.items():
        print(
            f"{run}: {1e3 * min(found):.2f} ms of CPU a token (of {args.rounds} rounds the slowest {1e3 * max(found):.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
