"""What a conformance check of a modality holds in its hands: the part under test, and raw data as the modality itself shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality
from mmlong.testing.verdicts import Verdicts

MakeModality = Callable[[int], Modality]
Raw = tuple[Tensor, Tensor | None, Tensor | None]

LENGTHS = (1, 7, 64)
"""Of raw examples, where the modality does not fix it."""


@dataclass
class ModalitySubject(Verdicts):
    """One width of the modality under test.

    Attributes:
        name: for messages.
        make: builds a fresh module of a width.
        dim: width D.
        device: where to run.
    """

    name: str
    make: MakeModality
    dim: int
    device: torch.device
    _module: Modality | None = field(default=None)

    def __str__(self) -> str:
        return f"{self.name} (dim {self.dim})"

    def build(self, seed: int = 0) -> Modality:
        """A fresh module in eval mode, float32, its parameters moved off what they were initialised to."""
        with self.running("construction"):
            torch.manual_seed(seed)
            module = self.make(self.dim).to(self.device)
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(torch.randn_like(p) * 0.1)
            return module.eval()

    def module(self, dtype: torch.dtype = torch.float32, fresh: bool = False) -> Modality:
        """The module in ``dtype``, having seen an example once; a copy in any other dtype than float32, or if ``fresh``."""
        if self._module is None:
            self._module = self.build()
            self.raw(self._module, 1, LENGTHS[-1])
        other = fresh or dtype != torch.float32
        return copy.deepcopy(self._module).to(dtype) if other else self._module

    def raw(self, module: Modality, batch: int, length: int, seed: int = 0) -> Raw:
        """The modality's own example on the device."""
        with self.running(f"example({batch}, {length}, generator)"):
            raw, lengths, resets = module.example(batch, length, torch.Generator().manual_seed(seed + 1))
        return raw.to(self.device), lengths, resets

    def uneven(self, module: Modality, batch: int, length: int, seed: int = 0, marks: bool = False) -> Raw:
        """An example with rows of lengths ``T``, ``T // 2``, ``1``, ... and, with ``marks``, a reset at the start and about every third place; only what the modality takes."""
        raw, lengths, resets = self.raw(module, batch, length, seed)
        last = raw.shape[-1]
        if lengths is not None:
            lengths = torch.tensor([max(last // 2**row, 1) for row in range(batch)], device=self.device)
        if resets is not None:
            drawn = torch.rand(batch, last, generator=torch.Generator().manual_seed(seed)) < 0.3
            drawn[:, 0] = True
            resets = drawn.to(self.device) if marks else None
        return raw, lengths, resets

    def takes(self, module: Modality) -> tuple[bool, bool]:
        """Whether the modality takes lengths, and resets."""
        _, lengths, resets = self.raw(module, 1, LENGTHS[-1])
        return lengths is not None, resets is not None

    def encode(self, module: Modality, raw: Raw, what: str) -> tuple[Tensor, Layout]:
        """One call of ``encode``, its answer of the right kind."""
        tensor, lengths, resets = raw
        where = f"encode of {what}, raw {tuple(tensor.shape)}"
        with self.running(where), torch.no_grad():
            answer = module.encode(tensor, lengths, resets)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor)):
            self.fail(f"{where}: must return (tokens, layout), returned {type(answer).__name__}")
        tokens, layout = answer
        if not isinstance(layout, Layout):
            self.fail(f"{where}: the second result must be a Layout, is {type(layout).__name__}")
        return tokens, layout

    def decode(self, module: Modality, tokens: Tensor, layout: Layout | None, what: str) -> Tensor:
        """One call of ``decode``."""
        with self.running(f"decode of {what}, tokens {tuple(tokens.shape)}"), torch.no_grad():
            return module.decode(tokens, layout)

    def valid(self, layout: Layout, length: int, batch: int) -> Tensor:
        """Bool ``(B, L)``."""
        valid = layout.valid(length)
        return torch.ones(batch, length, dtype=torch.bool, device=self.device) if valid is None else valid
