"""The systems of the first table of "Efficient Transformers: A Survey" (Tay, Dehghani, Bahri & Metzler 2020, arXiv 2009.06732, version 1), and what implements each here.

Names, costs and classes are the survey's. What implements a system is not written here: a mixer says so in its traits (``survey``), and :func:`implemented` asks the registry.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmlong.mixers.contract import MIXERS, list_mixers


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        name: the survey's.
        year: of the first paper.
        cost: as the survey writes it; n length, b block, k and m memory or landmarks, n_c compressed and n_g global length.
        decode: the survey says that it decodes causally.
        kind: the survey's class: FP fixed pattern, M memory, LP learnable pattern, LR low rank, KR kernel, RC recurrence.
    """

    name: str
    year: int
    cost: str
    decode: bool
    kind: str


TABLE_1 = (
    System("Memory Compressed", 2018, "n_c^2", True, "FP+M"),
    System("Image Transformer", 2018, "n m", True, "FP"),
    System("Set Transformer", 2019, "n k", False, "M"),
    System("Transformer-XL", 2019, "n^2", True, "RC"),
    System("Sparse Transformer", 2019, "n sqrt n", True, "FP"),
    System("Reformer", 2020, "n log n", True, "LP"),
    System("Routing Transformer", 2020, "n log n", True, "LP"),
    System("Axial Transformer", 2019, "n sqrt n", True, "FP"),
    System("Compressive Transformer", 2020, "n^2", True, "RC"),
    System("Sinkhorn Transformer", 2020, "b^2", True, "LP"),
    System("Longformer", 2020, "n (k + m)", True, "FP+M"),
    System("ETC", 2020, "n_g^2 + n n_g", False, "FP+M"),
    System("Synthesizer", 2020, "n^2", True, "LR+LP"),
    System("Performer", 2020, "n", True, "KR"),
    System("Linformer", 2020, "n", False, "LR"),
    System("Linear Transformers", 2020, "n", True, "KR"),
    System("Big Bird", 2020, "n", False, "FP+M"),
)


@dataclass(frozen=True)
class Implementation:
    """What implements a system.

    Attributes:
        mixer: registered name.
        takes: what it takes beside the name, e.g. an option.
    """

    mixer: str
    takes: str

    @property
    def name(self) -> str:
        return f"{self.mixer}: {self.takes}" if self.takes else self.mixer

    @property
    def status(self) -> str:
        """Forms, streaming, and the fidelity note."""
        t = MIXERS[self.mixer].traits
        forms = " and ".join(form for form, has in (("causal", t.causal), ("two-sided", t.bidirectional)) if has)
        streams = f", streams (state {t.state})" if t.causal and t.streaming else ""
        return f"{forms}{streams}; {t.note}" if t.note else f"{forms}{streams}"


def implemented(system: System) -> list[Implementation]:
    """What the registry has for a system, in the order of names; empty if nothing implements it yet."""
    return [
        Implementation(name, takes)
        for name in list_mixers()
        for said, takes in MIXERS[name].traits.survey
        if said == system.name
    ]
