"""The floor of the text models: what general compressors make of the same held-out documents, in bits per byte.

    python -m mmlong.experiments.floors.compressors stdlib
    python -m mmlong.experiments.floors.compressors bible

bz2 and xz at their strongest; each document by itself (compressed bits of all over bytes of all), and all of a split as one stream, in packing order. The
sizes count the formats' own headers, some tens of bytes a document.
"""

from __future__ import annotations

import argparse
import bz2
import lzma

from mmlong.experiments.floors.kmers import read_splits


def bits_per_byte(documents: list[bytes]) -> dict[str, float]:
    """By method and scope."""
    total = sum(map(len, documents))
    methods = {
        "bz2": lambda data: bz2.compress(data, 9),
        "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    found = {}
    for name, compress in methods.items():
        found[f"{name}, each by itself"] = 8 * sum(len(compress(data)) for data in documents) / total
        found[f"{name}, all in one"] = 8 * len(compress(b"".join(documents))) / total
    return found


def main() -> None:
    """Print the test split's numbers."""
    parser = argparse.ArgumentParser(description="Bits per byte of general compressors on held-out text.")
    parser.add_argument("dataset", choices=("stdlib", "bible"))
    name = parser.parse_args().dataset
    documents = [record.load() for record in read_splits(name)["test"]]
    print(f"{name}: {len(documents)} test documents, {sum(map(len, documents)):,} bytes")
    for what, bits in bits_per_byte(documents).items():
        print(f"  {what:22s} {bits:.3f} bits per byte")


if __name__ == "__main__":
    main()
