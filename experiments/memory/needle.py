"""A needle in a million tokens: a model trained on ``far_recall`` reads a prompt of any length in pieces, and is asked for all eight keys at its end.

``python -m mmlong.experiments.memory.needle NAME ... [--tokens 1048576] [--depths 0.1 0.5 0.9] [--rows 1] [--piece 4096] [--seed 0] [--json FILE] [--weights FOLDER]``

The pairs lie within 64 tokens at a depth of the prompt, noise before and after. Says, for each subject and depth, how many of the eight are right in each row, the seconds that reading took, the bytes of state and the most memory that the process has held (10^9 bytes, Python and torch included). Models that ``recall --weights FOLDER`` kept are taken from there.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmlong.experiments.command import experiment_parser
from mmlong.experiments.memory.recall import PROBE
from mmlong.experiments.memory.subjects import SUBJECTS, as_mixer, keep, kept

from mmlong.backbone.prefill import states_only
from mmlong.diagnose import Setting
from mmlong.diagnose.cell import ProbeModel, learn_model
from mmlong.diagnose.probes import FAR_KEYS, FAR_VALUES, NOISE, TOLD
from mmlong.mixers import state_bytes
from mmlong.results import write_json


def prompt(rng: np.random.Generator, rows: int, tokens: int, depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``(rows, tokens)`` whose last eight ask for each key once, and the answers ``(rows, 8)``."""
    codes = rng.integers(NOISE, size=(rows, tokens))
    row, keys = np.arange(rows)[:, None], np.arange(FAR_KEYS)
    values = rng.integers(FAR_VALUES, size=(rows, FAR_KEYS))
    begin = min(int(depth * tokens), tokens - TOLD - FAR_KEYS)
    told = begin + rng.random((rows, TOLD)).argsort(1)[:, :FAR_KEYS]
    codes[row, told] = NOISE + FAR_KEYS + FAR_VALUES * keys + values
    codes[:, -FAR_KEYS:] = NOISE + keys
    return codes, values


@torch.inference_mode()
def ask(model: ProbeModel, codes: np.ndarray, answers: np.ndarray, piece: int) -> dict[str, Any]:
    """Read in pieces, the questions one token at a time as a generator would."""
    begun, state, right = time.perf_counter(), None, np.zeros(answers.shape, bool)
    tokens = torch.from_numpy(codes)
    questions = tokens.shape[1] - FAR_KEYS
    for start in range(0, questions, piece):
        with states_only():
            _, state = model.backbone(model.embed(tokens[:, start : min(start + piece, questions)]), state)
    read = time.perf_counter() - begun
    for n in range(FAR_KEYS):
        x, state = model.backbone(model.embed(tokens[:, questions + n, None]), state)
        right[:, n] = model.decoder(x)[:, 0].argmax(-1).numpy() == answers[:, n]
    return {
        "right": right.sum(1).tolist(), "of": FAR_KEYS, "seconds": round(read, 1), "state_mb": round(state_bytes(state) / 1e6, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = experiment_parser("memory.needle", __doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=SUBJECTS)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--piece", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the probe's number of steps")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    for file in ("json", "weights"):
        parser.add_argument(f"--{file}", type=Path)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    found: list[dict[str, Any]] = []
    for name in args.names:
        setting = Setting(as_mixer(name), PROBE, seed=args.seed, scale=args.scale)
        model = kept(args.weights, setting) if args.weights else None
        if model is None:
            cell, model = learn_model(setting)
            print(f"{name}: learned in {cell.steps} steps, {cell.seconds:.0f} s", flush=True)
            if args.weights:
                keep(model, args.weights, setting)
        model.eval()
        for depth in args.depths:
            rng = np.random.default_rng([args.seed, 3, round(1000 * depth)])
            said = ask(model, *prompt(rng, args.rows, args.tokens, depth), args.piece)
            found.append({"name": name, "tokens": args.tokens, "depth": depth, **said})
            print(json.dumps(found[-1]), flush=True)
            if args.json:
                write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
