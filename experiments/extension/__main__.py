"""Trained at one length, used at sixteen times that: bits by position.

``python -m mmlong.experiments.extension [NAME ...] [--data bible] [--train 4096] [--factor 16] [--steps 150] [--json FILE] [--markdown FILE]``

Every mixer trains alike: a small byte model, the same random windows of ``--train`` tokens. Then held-out rows of ``factor`` times as many are read from piece to piece with the state carried, so in bounded memory where the state is
bounded, and bits are told by position. Text is harder in one place than in another; so the same tokens are read once more cut into windows of the training length, and what is told is the difference: below zero, what lies further back than training ever
reached helps; above, it harms. Beside it the root mean square of the state at the end of the row over that at the length of training: whether a state goes on as it was or grows.

A row is kept when it is done: a command that was stopped goes on (``--json``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import torch
from mmlong.experiments.command import add_result_options, experiment_parser, keep, kept, parse_names
from mmlong.experiments.extension.subjects import SUBJECTS, Spec
from mmlong.experiments.floors.kmers import read_splits
from torch import Tensor

from mmlong.mixers import State, state_tensors
from mmlong.models import AutoregressiveModel, build_model
from mmlong.results import markdown_table
from mmlong.training.optim import OptimConfig, build_optimizer

DATA = {"bible": "text", "stdlib": "text", "chromosome": "genome"}
"""Known sources, and their modality."""
AS_TRAINED = "as trained"
Found = list[dict[str, Any]]


def read(name: str, split: str) -> Tensor:
    """The documents of a split, one behind another: uint8 ``(T,)``."""
    return torch.frombuffer(bytearray(b"".join(r.load() for r in read_splits(name)[split])), dtype=torch.uint8)


def build(args: argparse.Namespace, mixer: Spec) -> AutoregressiveModel:
    """The model; the same weights whatever their use."""
    torch.manual_seed(args.seed)
    model = build_model(
        {
            "kind": "autoregressive", "modality": {"name": DATA[args.data]},
            "backbone": {"dim": args.dim, "depth": args.depth, "mixers": [mixer], "ffn_ratio": 2.0},
        }
    )  # fmt: skip
    assert isinstance(model, AutoregressiveModel)
    return model


def train(model: AutoregressiveModel, raw: Tensor, args: argparse.Namespace) -> float:
    """So many steps on random windows, the same for every model; bits a token of the last tenth of them."""
    optimizer, schedule = build_optimizer(model, OptimConfig(lr=args.lr, warmup=args.steps // 10), args.steps)
    draw = torch.Generator().manual_seed(args.seed)
    last: list[float] = []
    model.train()
    for step in range(args.steps):
        begin = torch.randint(len(raw) - args.train + 1, (args.batch,), generator=draw).tolist()
        tokens, layout = model.encode(torch.stack([raw[i : i + args.train] for i in begin]))
        total, count = model.head.loss(model(tokens, None, layout)[0], tokens)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step >= args.steps - max(1, args.steps // 10):
            last.append(float(loss.detach()) / math.log(2))
    return sum(last) / len(last)


def size_of(state: State) -> float:
    """Root mean square of all numbers of a state."""
    tensors = [t for t in state_tensors(state) if t.is_floating_point() and t.numel()]
    total = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(total / max(1, sum(t.numel() for t in tensors)))


@torch.inference_mode()
def read_on(
    model: AutoregressiveModel, tokens: Tensor, piece: int, marks: tuple[int, ...] = ()
) -> tuple[Tensor, list[float]]:
    """Bits of every token ``(B, L)``, read from piece to piece, and the size of the backbone's state after ``marks`` tokens."""
    bits, sizes = [], []
    state: State = None
    ends = sorted({*range(piece, tokens.shape[1], piece), *marks, tokens.shape[1]})
    for i, j in zip([0, *ends], ends, strict=False):
        here = tokens[:, i:j]
        prediction, state = model(here, state)
        nats = -prediction.float().log_softmax(-1).gather(-1, here[..., None].long()).squeeze(-1)
        bits.append(nats / math.log(2))
        if j in marks:
            sizes.append(size_of(state["backbone"]))  # type: ignore[index]
    return torch.cat(bits, 1), sizes


def edges(length: int, factor: int) -> list[int]:
    """Where stretches end: at the length of training, and then at each of its doubles."""
    found = [length]
    while found[-1] < length * factor:
        found.append(min(2 * found[-1], length * factor))
    return found


def by_position(bits: Tensor, ends: list[int]) -> list[float]:
    """Mean over the tokens of each stretch."""
    return [float(bits[:, i:j].double().mean()) for i, j in zip([0, *ends], ends, strict=False)]


def measure(model: AutoregressiveModel, raw: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """What one use of a trained model costs in bits, by position, beside the same tokens in windows of the training length."""
    ends = edges(args.train, args.factor)
    whole, cut, sizes = [], [], []
    for row in range(args.rows):
        tokens, _ = model.encode(raw[None, row * ends[-1] : (row + 1) * ends[-1]])
        bits, size = read_on(model, tokens, args.piece, (args.train, ends[-1]))
        windows, _ = read_on(model, tokens.view(-1, args.train), args.piece)
        whole.append(bits)
        cut.append(windows.view(1, -1))
        sizes.append(size[-1] / size[0] if size[0] else math.nan)
    found, alone = by_position(torch.cat(whole), ends), by_position(torch.cat(cut), ends)
    return {
        "bits": [round(b, 4) for b in found],
        "difference": [round(a - b, 4) for a, b in zip(found, alone, strict=True)],
        "state": round(sum(sizes) / len(sizes), 3),
    }


def table(rows: Found) -> str:
    """Markdown of what was found."""
    ends = rows[0]["ends"]
    head = ["mixer", "at use", f"bits, 0 to {ends[0]:,}"]
    head += [f"to {end:,}, and against windows of {ends[0]:,}" for end in ends[1:]]
    lines = [
        [
            row["name"], row["use"], f"{row['bits'][0]:.3f}",
            *(f"{b:.3f} ({d:+.3f})" for b, d in zip(row["bits"][1:], row["difference"][1:], strict=True)), f"{row['state']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown_table([*head, "state"], lines)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = experiment_parser("extension", __doc__)
    parser.add_argument("--data", choices=DATA, default="bible")
    parser.add_argument("--train", type=int, default=4096, help="tokens of a training window")
    parser.add_argument("--factor", type=int, default=16, help="times as many at use")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rows", type=int, default=3, help="held-out rows at use")
    parser.add_argument("--piece", type=int, default=4096, help="tokens read at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    add_result_options(parser)
    args = parse_names(parser, SUBJECTS, argv)
    torch.set_num_threads(args.threads)
    held_out = read(args.data, "test")
    if len(held_out) < args.rows * args.train * args.factor:
        parser.error(
            f"{args.data} holds out {len(held_out):,} tokens, too few for {args.rows} rows of {args.train * args.factor:,}"
        )
    setting = {key: value for key, value in vars(args).items() if key not in ("names", "json", "markdown", "threads")}
    rows: Found = kept(args.json, [])
    texts: Tensor | None = None
    for name in args.names:
        if any(row["name"] == name and row["setting"] == setting for row in rows):
            continue
        subject = SUBJECTS[name]
        texts = read(args.data, "train") if texts is None else texts
        begun = time.process_time()
        trained = build(args, subject.mixer(args.dim, args.train))
        learned = train(trained, texts, args)
        seconds = time.process_time() - begun
        uses = {AS_TRAINED: subject.mixer(args.dim, args.train)}
        uses |= {use: spec(args.dim, args.train, args.factor) for use, spec in subject.uses.items()}
        done: Found = []
        for use, spec in uses.items():
            model = build(args, spec)
            model.load_state_dict(trained.state_dict())
            begun = time.process_time()
            found = measure(model.eval(), held_out, args)
            done.append(
                {
                    "name": name, "use": use, "setting": setting, "ends": edges(args.train, args.factor), **found,
                    "parameters": model.num_parameters(), "train_bits": round(learned, 4),
                    "train_cpu_seconds": round(seconds, 1), "use_cpu_seconds": round(time.process_time() - begun, 1),
                }
            )  # fmt: skip
            print(json.dumps({key: value for key, value in done[-1].items() if key != "setting"}), flush=True)
        rows += done
        keep(args.json, rows)
    if args.markdown and rows:
        args.markdown.write_text(table([row for row in rows if row["setting"] == setting]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
