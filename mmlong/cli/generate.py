"""``mmlong generate`` and ``mmlong score``: what an autoregressive run makes, and how likely it finds a file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlong.cli.conversions import add_conversions, conversions
from mmlong.cli.errors import CommandError
from mmlong.cli.runs import saved_autoregressive, saved_model

GENERATE = """\
examples:
  mmlong generate text/stdlib_ar --length 2000 --prompt 'def main():' --stream
  mmlong generate RUN --prompt_file voice.wav --prompt_length 4000 --length 8000 --count 4
  mmlong generate RUN --prompt_file photo.png                 the lower half of a picture
  mmlong generate RUN --temperature 0.9 --top_p 0.95 --seed 1
  mmlong generate joint/digits_words --as word --given sound=seven.wav      of a joint model: the word of a sound
  mmlong generate joint/digits_words --as sound --given_text word=$'seven\n' --length 4000

RUN is a run folder, a folder of a saved model, or a recipe's name (its newest run).
"""
SCORE = """\
examples:
  mmlong score text/stdlib_ar mymodule.py
  mmlong score RUN chromosome.fa.gz --segment 65536
  mmlong score joint/digits_words --as word --given sound=seven.wav seven.txt     of a joint model: a word after its sound

RUN is a run folder, a folder of a saved model, or a recipe's name (its newest run).
"""


def run_generate(argv: list[str]) -> int:
    """Run ``mmlong generate``; 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog="mmlong generate", description="Draw samples from an autoregressive model and write them as files.",
        epilog=GENERATE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--length", type=int, help="new tokens (default: 1024, or the rest of a sample of fixed size)")
    parser.add_argument("--count", type=int, default=1, help="how many samples at once (default 1)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="begin with this text, these letters of DNA, or these codes")
    prompt.add_argument("--prompt_file", type=Path, help="begin with this file (its first record, of FASTA)")
    parser.add_argument(
        "--prompt_length", type=int, help="tokens of the file to begin with (default: all; half of a picture)"
    )
    _add_spans(parser, "make")
    add_conversions(parser)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest, always (default 1)")
    parser.add_argument("--top_k", type=int, help="draw among the k likeliest only")
    parser.add_argument("--top_p", type=float, help="draw among the likeliest that together have this probability")
    parser.add_argument("--min_p", type=float, help="draw among those at least this share as likely as the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--stream", action="store_true", help="write a text or sequence to standard output as it is drawn"
    )
    parser.add_argument("--out", type=Path, help="folder for the files (default: RUN/generated)")
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    from mmlong.datamodules.errors import DataError

    try:
        return _generate(args)
    except (DataError, ValueError) as error:
        raise CommandError(str(error), status=1) from error


def _generate(args: argparse.Namespace) -> int:
    import torch

    from mmlong.generation import generate
    from mmlong.heads import Sampling
    from mmlong.samples import write_samples

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    if args.count < 1 or (args.length is not None and args.length < 1):
        raise ValueError("--count and --length are at least 1")
    model, folder, state = _model(args, "make", args.count)
    modality = model.modality
    whole = modality.tokens_per_sample()
    prompt = _prompt(args, modality, whole)
    begun = 0 if prompt is None else prompt.shape[1]
    length = args.length if args.length is not None else (1024 if whole is None else whole - begun)
    if whole is not None and begun + length != whole:
        raise ValueError(
            f"a picture has {whole} tokens: after a prompt of {begun} there are {whole - begun} to draw; leave out --length"
        )
    if args.stream and modality.kind not in ("text", "genome"):
        raise ValueError(f"--stream writes texts and sequences; this model makes {modality.kind}")
    rows = args.count if prompt is None else 1
    given = None if prompt is None else prompt.expand(args.count, *prompt.shape[1:]).contiguous()

    def show(token: Any) -> None:
        sys.stdout.buffer.write(modality.decode(token[:1]).to(torch.uint8).numpy().tobytes())
        sys.stdout.buffer.flush()

    if args.stream and prompt is not None:
        show(prompt)
    begin = time.monotonic()
    draw = torch.Generator().manual_seed(args.seed)
    tokens = generate(
        model, length, given, rows, sampling, draw, on_token=show if args.stream else None, state=state
    )  # fmt: skip
    seconds = time.monotonic() - begin
    if args.stream:
        print(flush=True)
    files = write_samples(modality, modality.decode(tokens), args.out or folder / "generated")
    print(
        f"{args.count * length:,} tokens in {seconds:.1f} s, {1000 * seconds / length:.1f} ms a step of {args.count}; "
        f"in {files[0].parent}: {', '.join(file.name for file in files)}"
    )
    return 0


def _add_spans(parser: argparse.ArgumentParser, verb: str) -> None:
    """Options of joint models."""
    parser.add_argument("--as", dest="speaks", metavar="NAME", help=f"of a joint model: which modality to {verb}")
    parser.add_argument(
        "--given",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="of a joint model: a span that comes before, from a file; may be repeated",
    )
    parser.add_argument(
        "--given_text", metavar="NAME=TEXT", action="append", default=[], help="the same, of a text or letters of DNA; they come behind those of files"
    )  # fmt: skip


def _model(args: argparse.Namespace, verb: str, rows: int) -> tuple[Any, Path, Any]:
    """The model of one modality (of a joint model, as that modality), its folder, and the state after what is given of others (``None``: nothing is)."""
    import torch

    from mmlong.cli.raw_files import read_documents
    from mmlong.generation import read
    from mmlong.models import JointModel

    model, folder = saved_model(args.run, Path(args.runs))
    given = [*((*_named(each), False) for each in args.given), *((*_named(each), True) for each in args.given_text)]
    if not isinstance(model, JointModel):
        if args.speaks is not None or given:
            raise ValueError(f"--as and --given are for joint models; {folder} holds a model of one modality")
        return *saved_autoregressive(str(folder), Path(args.runs)), None
    if args.speaks is None:
        raise ValueError(f"{folder} holds a joint model: say what to {verb}, --as {' or '.join(model.names)}")
    state = None
    for name, what, is_text in given:
        before = model.speaking(name)
        if is_text:
            if before.modality.kind not in ("text", "genome"):
                raise ValueError(f"--given_text is for texts and sequences, and {name} is {before.modality.kind}: --given {name}=FILE")  # fmt: skip
            raw = torch.frombuffer(bytearray(what.encode("utf-8", "surrogateescape")), dtype=torch.uint8)
            tokens = before.modality.encode(raw[None])[0]
        else:
            _, document = next(iter(read_documents(before.modality, Path(what), **conversions(args))))
            tokens = torch.cat([before.modality.encode(raw)[0] for raw in document], 1)
        tokens = tokens.expand(rows, *tokens.shape[1:]).contiguous()
        with torch.inference_mode():
            state = read(before, tokens, before.begin(rows) if state is None else before.open(state))
    speaking = model.speaking(args.speaks)
    return speaking, folder, None if state is None else speaking.open(state)


def _named(given: str) -> tuple[str, str]:
    name, sign, what = given.partition("=")
    if not sign or not what:
        raise ValueError(f"{given!r} is not NAME=FILE (or NAME=TEXT): name the modality that it is of")
    return name, what


def _prompt(args: argparse.Namespace, modality: Any, whole: int | None) -> Any:
    """Tokens to begin with, ``(1, L, ...)``, or ``None``."""
    import torch

    from mmlong.cli.raw_files import read_codes, read_documents

    if args.prompt is not None and modality.kind == "tokens" and args.prompt.strip():
        return modality.encode(read_codes(args.prompt))[0]
    if args.prompt is not None:
        if modality.kind not in ("text", "genome", "tokens"):
            raise ValueError(
                f"--prompt is for texts and sequences; this model makes {modality.kind}: give a --prompt_file"
            )
        data = args.prompt.encode("utf-8", "surrogateescape")
        if not data:
            raise ValueError("--prompt is empty; leave it out to begin from nothing")
        return modality.encode(torch.frombuffer(bytearray(data), dtype=torch.uint8)[None])[0]
    if args.prompt_file is None:
        return None
    wanted = args.prompt_length if args.prompt_length is not None else (None if whole is None else whole // 2)
    if wanted is not None and wanted < 1:
        raise ValueError("--prompt_length is at least 1")
    pieces, found = [], 0
    _, document = next(iter(read_documents(modality, args.prompt_file, **conversions(args))))
    for raw in document:
        pieces.append(modality.encode(raw)[0])
        found += pieces[-1].shape[1]
        if wanted is not None and found >= wanted:
            break
    if wanted is not None and found < wanted:
        raise ValueError(f"{args.prompt_file} has {found:,} tokens; --prompt_length asks for {wanted:,}")
    return torch.cat(pieces, 1)[:, :wanted]


def run_score(argv: list[str]) -> int:
    """Run ``mmlong score``; 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog="mmlong score", description="Bits that an autoregressive model needs for files of any length, in bounded memory.",
        epilog=SCORE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    _add_spans(parser, "score")
    parser.add_argument("--segment", type=int, default=16384, help="tokens run at a time (default 16384)")
    add_conversions(parser)
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    from mmlong.datamodules.errors import DataError

    try:
        return _score(args)
    except (DataError, ValueError) as error:
        raise CommandError(str(error), status=1) from error


def _score(args: argparse.Namespace) -> int:
    from mmlong.cli.raw_files import read_documents
    from mmlong.generation import score

    if args.segment < 1:
        raise ValueError("--segment is at least 1")
    model, _, state = _model(args, "score", 1)
    unit = "number of a pixel" if model.modality.kind == "image" else model.modality.unit
    bits, numbers = 0.0, 0
    several = False
    for path in args.files:
        for name, pieces in read_documents(model.modality, path, **conversions(args)):
            tokens = (model.modality.encode(raw)[0] for raw in pieces)
            found, count = score(model, _cut(tokens, args.segment), state)
            several = numbers > 0
            bits, numbers = bits + found, numbers + count
            shown = str(path) if name == path.name else f"{path} {name}"
            print(f"{found / count:.4f} bits a {unit}, {count:,} in all, {found / 8:,.0f} bytes: {shown}", flush=True)
    if several:
        print(f"{bits / numbers:.4f} bits a {unit}, {numbers:,} in all, {bits / 8:,.0f} bytes: together")
    return 0


def _cut(tokens: Iterator[Any], segment: int) -> Iterator[Any]:
    """The same tokens, no piece longer than ``segment``."""
    for piece in tokens:
        for start in range(0, piece.shape[1], segment):
            yield piece[:, start : start + segment]
