"""``mmlong knn``: datastores of a trained model (kNN-LM), and neighbours of chunks (RETRO)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError
from mmlong.registry import nearest

HELP = """\
usage: mmlong knn WHAT [...]

  build        mmlong knn build text/stdlib_ar --out stdlib.store            keep the features and next tokens of a run's training split
  evaluate     mmlong knn evaluate text/stdlib_ar stdlib.store --k 1024      bits of held-out documents, without and with it (kNN-LM)
  neighbours   mmlong knn neighbours text/stdlib_ar --out stdlib.near        chunks of training documents, and those most like each (RETRO)

`mmlong knn WHAT --help` says more.
"""
BUILD = """\
examples:
  mmlong knn build text/stdlib_ar --out stdlib.store
  mmlong knn build RUN --out STORE --limit 1000000 --dtype float32

RUN is a run folder or a recipe's name (its newest run). Documents that are, byte for byte, in another split as well are left out.
"""
EVALUATE = """\
examples:
  mmlong knn evaluate text/stdlib_ar stdlib.store
  mmlong knn evaluate RUN STORE --split val --weight 0.1 0.25 0.5 --temperature 10 --limit 100000

RUN is the run that the datastore was built from. Choose weight and temperature by the split val, and say what they give on test.
"""
NEIGHBOURS = """\
examples:
  mmlong knn neighbours text/stdlib_ar --out stdlib.near
  mmlong knn neighbours RUN --out NEAR --chunk 32 --count 4

A model retrieves from it by a part of its backbone, {retro: 64, index: NEAR}. Chunks are compared by their n-grams of tokens, hashed. RUN is a run folder, a recipe's file or name. Documents that are, byte for byte, in another split as well are left out.
"""
WHAT = ("build", "evaluate", "neighbours")


def run_knn(argv: list[str]) -> int:
    """Run ``mmlong knn``; 0 if all is well.

    Raises:
        CommandError: something is wrong with the command, the run, the data or the folder.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] not in WHAT:
        raise CommandError(f"there is no {argv[0]!r}{nearest(argv[0], WHAT)}; there are: {', '.join(WHAT)}")
    from mmlong.cli.train import hush
    from mmlong.datamodules.errors import DataError

    hush()
    try:
        return {"build": _build, "evaluate": _evaluate, "neighbours": _neighbours}[argv[0]](argv[1:])
    except (DataError, ValueError, ImportError) as error:
        raise CommandError(str(error), status=1) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CommandError(
            f"{where}{error.strerror or error}; nothing is left of what was not whole", status=1
        ) from error


def _parser(what: str, about: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"mmlong knn {what}", description=about, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    if what != "neighbours":
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
        parser.add_argument("--device", default="cpu", help="where the model runs, and is searched (default: cpu)")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and what is for the datamodule of the run: ``--data.KEY VALUE``."""
    args, rest = parser.parse_known_args(argv)
    for word in rest[::2]:
        if not word.startswith("--data."):
            parser.error(f"unrecognised {word}; the run's data can be changed with --data.KEY VALUE")
    return args, rest


def _recipe(name: str, overrides: list[str]) -> tuple[Any, Any]:
    """The datamodule, its data there, and the task of a recipe."""
    from mmlong.cli.build import build, parse
    from mmlong.cli.recipes import load_recipes
    from mmlong.cli.train import check_config

    config = load_recipes([name], overrides)
    check_config(config, overrides, name)
    data, task = build(*parse(config, overrides))
    data.prepare_data()
    return data, task


def _data(folder: Path, overrides: list[str]) -> Any:
    """The datamodule that a run was trained on, its data there."""
    from mmlong.runs import CONFIG

    if not (folder / CONFIG).is_file():
        raise CommandError(
            f"{folder} has no {CONFIG}, which says what data it was trained on: name a run folder", status=1
        )
    return _recipe(str(folder / CONFIG), overrides)[0]


def _build(argv: list[str]) -> int:
    parser = _parser("build", "Keep what a trained model sees before each token, and the token: a datastore.", BUILD)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--split", default="train", help="whose documents (default: train)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N tokens (default: all)")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="of the keys")
    parser.add_argument("--segment", type=int, default=4096, help="tokens run at a time (default 4096)")
    args, overrides = _parse(parser, argv)
    from mmlong.cli.runs import saved_autoregressive
    from mmlong.knn.documents import Documents, held_out
    from mmlong.knn.knn_lm import build_datastore

    model, folder = saved_autoregressive(args.run, args.runs)
    data = _data(folder, overrides)
    documents = Documents(data, args.split, model.modality)
    kept = _kept(documents, held_out(data, args.split, model.modality))
    begun = time.monotonic()
    count = build_datastore(
        model.to(args.device), (documents.tokens(n) for n in kept), args.out, {**documents.source, "run": str(folder)}, limit=args.limit,
        dtype=args.dtype, segment=args.segment,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(
        f"{count:,} tokens of {documents.split} in {args.out}, {size / 1e6:,.1f} MB, in {time.monotonic() - begun:.0f} s"
    )
    return 0


def _kept(documents: Any, others: list[Any]) -> list[int]:
    """Those that no other split has, too."""
    kept = list(documents.without(others))
    if copies := len(documents) - len(kept):
        print(f"{copies:,} documents left out, whose bytes are in another split as well")
    return kept


def _evaluate(argv: list[str]) -> int:
    parser = _parser("evaluate", "Bits of held-out documents, by a model alone and with its datastore.", EVALUATE)
    parser.add_argument("store", metavar="FOLDER", type=Path)
    parser.add_argument("--split", default="test", help="whose documents (default: test)")
    parser.add_argument("--k", type=int, default=1024, help="neighbours of each token (default 1024)")
    parser.add_argument(
        "--weight", type=float, nargs="+", default=[0.25], metavar="L", help="of what they say (default 0.25)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of their distances (default 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N tokens (default: all)")
    parser.add_argument("--segment", type=int, default=1024, help="tokens run at a time (default 1024)")
    parser.add_argument("--search", default="exact", choices=["exact", "faiss"])
    args, overrides = _parse(parser, argv)
    from mmlong.cli.runs import saved_autoregressive
    from mmlong.knn.documents import Documents
    from mmlong.knn.knn_lm import Datastore, NearestNeighbours, check_weight, codes_of, measure

    for weight in args.weight:
        check_weight(weight)
    model, folder = saved_autoregressive(args.run, args.runs)
    store = Datastore(args.store, model)
    model = model.to(args.device)
    neighbours = NearestNeighbours(store, codes_of(model), args.k, args.temperature, args.search)
    documents = Documents(_data(folder, overrides), args.split, model.modality)
    if all(store.source.get(key) == documents.source[key] for key in ("fingerprint", "split")):
        raise CommandError(
            f"{args.store} was built of {args.split} of these very data: that a model finds again what it has looked up is no result. Take another --split",
            status=1,
        )
    found = measure(
        model, neighbours, (documents.tokens(n) for n in range(len(documents))), args.weight, limit=args.limit,
        segment=args.segment,
    )  # fmt: skip
    unit = model.modality.unit
    print(f"{found.tokens:,} tokens of {args.split}; {len(store):,} in {args.store}")
    print(f"{found.alone / found.tokens:.4f} bits a {unit}, the model alone")
    for weight, bits in zip(args.weight, found.together, strict=True):
        print(
            f"{bits / found.tokens:.4f} bits a {unit}, with {weight:g} of the {min(args.k, len(store)):,} nearest, at temperature {args.temperature:g}"
        )
    return 0


def _neighbours(argv: list[str]) -> int:
    parser = _parser(
        "neighbours", "Index chunks of documents, and find those of others that are most like each.", NEIGHBOURS
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--split", default="train", help="whose documents (default: train)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N tokens (default: all)")
    parser.add_argument("--chunk", type=int, default=64, metavar="M", help="tokens of a chunk (default 64)")
    parser.add_argument("--count", type=int, default=2, metavar="K", help="neighbours of each (default 2)")
    parser.add_argument("--dim", type=int, default=256, help="buckets that n-grams are hashed into (default 256)")
    parser.add_argument("--ngram", type=int, default=4, metavar="N", help="tokens of a gram (default 4)")
    args, overrides = _parse(parser, argv)
    from mmlong.knn.documents import Documents, held_out
    from mmlong.retrieval.neighbours import build_neighbours
    from mmlong.runs import CONFIG

    folder = Path(args.run)
    data, task = _recipe(str(folder / CONFIG) if folder.is_dir() else args.run, overrides)
    modality = task.model.modality
    if modality.codes is None:
        raise CommandError(f"chunks are of codes, and {type(modality).__name__} has none", status=1)
    documents = Documents(data, args.split, modality)
    kept = _kept(documents, held_out(data, args.split, modality))
    begun = time.monotonic()
    count = build_neighbours(
        (documents.tokens(n) for n in kept), args.out, documents.source, codes=modality.codes, m=args.chunk,
        k=args.count, dim=args.dim, n=args.ngram, limit=args.limit,
    )  # fmt: skip
    print(f"{count:,} chunks of {args.chunk} tokens in {args.out}, in {time.monotonic() - begun:.0f} s")
    return 0
