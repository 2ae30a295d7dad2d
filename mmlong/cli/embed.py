"""``mmlong embed``: what a trained model makes of files, one vector a file or one a token."""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlong.cli.conversions import add_conversions, add_on_bad, conversions
from mmlong.cli.errors import CommandError

EPILOG = """\
examples:
  mmlong embed image/cells256 photos/*.png --out features.npz
  mmlong embed text/stdlib_ar *.py --pool mean --out features.parquet     a model of the next token pools nothing: say how
  mmlong embed RUN recording.wav --tokens --out tokens.npz                a vector of each token

RUN is a run folder, a folder of a saved model, or a recipe's name (its newest run). One row a file in the order given, of FASTA one a record.
features.npz holds `features` (N, D) in float32, `files` and `names` (N,). With --tokens it holds `features_0`, `features_1`, ... (L, D), of pictures (H, W, D).
A parquet file has the columns file, name and features, and takes the extra mmlong[parquet].
"""
SUFFIXES = (".npz", ".parquet")


def run_embed(argv: list[str]) -> int:
    """Run ``mmlong embed``; 0 if all is well.

    Raises:
        CommandError: the command is wrong, there is no such model, or a file cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        prog="mmlong embed", description="Features of files by a trained model: what its head pools, or those of each token.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="features.npz or features.parquet")
    parser.add_argument("--pool", help="mean, last or max over tokens (default: as the head does)")
    parser.add_argument("--tokens", action="store_true", help="a vector of each token, and not of the file (npz)")
    parser.add_argument("--segment", type=int, default=16384, help="tokens that a streaming model reads at a time")
    add_on_bad(parser)
    add_conversions(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    from mmlong.datamodules.errors import DataError

    try:
        return _embed(args)
    except DataError as error:
        hint = "; --on-bad skip leaves such out" if len(args.files) > 1 else ""
        raise CommandError(f"{error}{hint}", status=1) from error
    except (ValueError, ImportError) as error:
        raise CommandError(str(error), status=1) from error
    except OSError as error:
        raise CommandError(f"{error.filename or args.out}: {error.strerror or error}", status=1) from error


def _embed(args: argparse.Namespace) -> int:
    from mmlong.cli.raw_files import read_documents
    from mmlong.cli.runs import saved_model
    from mmlong.datamodules.errors import DataError
    from mmlong.embedding import check_pool, embed, embed_tokens

    if args.out.suffix not in SUFFIXES:
        raise CommandError(f"--out {args.out}: name it .npz or .parquet")
    if args.tokens and (args.pool is not None or args.out.suffix != ".npz"):
        raise CommandError(
            "--tokens are not pooled, and lie in a .npz file: one array a file, as long as it has tokens"
        )
    write = _npz if args.out.suffix == ".npz" else _parquet()
    model, folder = saved_model(args.run, Path(args.runs))
    model = model.to(args.device)
    if not args.tokens:
        check_pool(model, args.pool)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str]] = []
    left: list[Path] = []

    def vector(path: Path, name: str, pieces: Iterator[Any]) -> Any:
        try:
            if args.tokens:
                found = embed_tokens(model, pieces, args.segment)
            else:
                found = embed(model, pieces, args.pool, args.segment)
        except DataError:
            raise
        except ValueError as error:
            raise ValueError(f"{path} {name}: {error}" if name != path.name else f"{path}: {error}") from error
        return found.float().cpu().numpy()

    def vectors() -> Iterator[Any]:
        for path in args.files:
            try:
                for name, pieces in read_documents(model.modality, path, **conversions(args)):
                    found = vector(path, name, pieces)
                    rows.append((str(path), name))
                    yield found
            except DataError as error:
                if args.on_bad == "stop":
                    raise
                left.append(path)
                print(f"left out: {error}", file=sys.stderr, flush=True)
        if not rows:
            raise ValueError("none of these files can be read")

    shape = write(args.out, vectors(), rows, args.tokens)
    told = f"; {len(left):,} of {len(args.files):,} files left out" if left else ""
    print(f"{len(rows):,} rows of {shape} by {folder}; in {args.out}{told}")
    return 0


def _npz(out: Path, vectors: Iterator[Any], rows: list[tuple[str, str]], tokens: bool) -> str:
    """Write vectors as they come, and ``rows``, which are complete when the last has come; what one is, for people."""
    import numpy as np

    partial = out.with_name(out.name + ".partial")
    try:
        with zipfile.ZipFile(partial, "w", allowZip64=True) as archive:

            def add(name: str, array: Any) -> None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)

            pooled, width = [], 0
            for number, vector in enumerate(vectors):
                width = vector.shape[-1]
                if tokens:
                    add(f"features_{number}", vector)
                else:
                    pooled.append(vector)
            if not tokens:
                add("features", np.stack(pooled))
            add("files", np.array([file for file, _ in rows]))
            add("names", np.array([name for _, name in rows]))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return f"{width} numbers a token" if tokens else f"{width} numbers"


def _parquet() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "a .parquet file takes pyarrow, which is not installed: pip install 'mmlong[parquet]', or name --out features.npz"
        ) from error

    def write(out: Path, vectors: Iterator[Any], rows: list[tuple[str, str]], tokens: bool) -> str:
        found = list(vectors)
        width = found[0].shape[0]
        kind = pyarrow.list_(pyarrow.float32(), width)
        table = pyarrow.table({
            "file": [file for file, _ in rows], "name": [name for _, name in rows],
            "features": pyarrow.array(found, type=kind),
        })  # fmt: skip
        partial = out.with_name(out.name + ".partial")
        try:
            pyarrow.parquet.write_table(table, partial)
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
        return f"{width} numbers"

    return write
