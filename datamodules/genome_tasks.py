"""The tasks of two collections of DNA classification, and their classes; what reads them is :mod:`mmlong.datamodules.genome_benchmarks`. A table alone, so that their names are known without it."""

from __future__ import annotations

GENOMIC_BENCHMARKS: dict[str, tuple[str, ...]] = {
    "demo_coding_vs_intergenomic_seqs": ("coding_seqs", "intergenomic_seqs"),
    "demo_human_or_worm": ("human", "worm"),
    "drosophila_enhancers_stark": ("negative", "positive"),
    "dummy_mouse_enhancers_ensembl": ("negative", "positive"),
    "human_enhancers_cohn": ("negative", "positive"),
    "human_enhancers_ensembl": ("negative", "positive"),
    "human_ensembl_regulatory": ("enhancer", "ocr", "promoter"),
    "human_nontata_promoters": ("negative", "positive"),
    "human_ocr_ensembl": ("negative", "positive"),
}
_TWO = ("0", "1")
_THREE = ("0", "1", "2")
NUCLEOTIDE_TRANSFORMER: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("H2AFZ", "H3", "H3K14ac", "H3K27ac", "H3K27me3", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K79me3", "H3K9ac", "H3K9me3", "H4", "H4K20me1", "H4ac", "enhancers"),
        _TWO,
    ),
    "enhancers_types": _THREE,
    **dict.fromkeys(("promoter_all", "promoter_no_tata", "promoter_tata"), _TWO),
    **dict.fromkeys(("splice_sites_acceptors", "splice_sites_donors"), _TWO),
    "splice_sites_all": _THREE,
}  # fmt: skip
"""Of both versions of the set; yeast's histone marks are in the first only, some human ones in the revised."""
