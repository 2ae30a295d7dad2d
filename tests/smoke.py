"""An installed mmlong, used: for environments in which nothing else is installed. tests/environments.py runs it there, in an empty folder.

    python smoke.py [--page docs/your_data.md]

Imports every module, asks the command for its version and `doctor`, holds a few mixers to the fast part of the contract, and with ``--page`` does what a page of the documentation does, block after block.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

MIXERS = ("attention", "local", "mamba2", "s4d", "hyena", "gated_deltanet", "nystromformer", "min_gru")
PROPERTIES = ("pieces", "padding", "causality", "gradients", "segments")
OPTIONAL = {
    "gradio",
    "transformers",
    "pyarrow",
    "faiss",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "xformers",
    "fla",
    "triton",
    "mamba_ssm",
    "causal_conv1d",
}
"""What extras bring: a module that is of one of them may say that it is missing."""


def import_everything() -> int:
    """Import every module of the package; how many there are."""
    import mmlong

    count = 0
    for module in pkgutil.walk_packages(mmlong.__path__, "mmlong."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise
        count += 1
    return count


def check_mixers() -> None:
    """The fast part of the contract."""
    from mmlong.testing import check_mixer

    for name in MIXERS:
        wanted = [each for each in PROPERTIES if name != "nystromformer" or each == "padding"]
        print(f"{name}: {', '.join(check_mixer(name, only=wanted, dims=(16,)))}", flush=True)


def walk(page: Path) -> None:
    """What a page does: its blocks of bash and Python in turn, each a process in this folder."""
    for language, code in re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
        words = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        subprocess.run(words, check=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    print(f"{import_everything()} modules")
    for words in (["--version"], ["doctor"], ["recipes"]):
        subprocess.run(["mmlong", *words], check=True, stdout=subprocess.DEVNULL)
    check_mixers()
    if args.page is not None:
        walk(args.page)


if __name__ == "__main__":
    main()
