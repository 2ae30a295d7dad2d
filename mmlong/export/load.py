"""Exported programs as objects that check what they are given.

    predictor = load(folder);  predictor(raw, lengths)
    generator = load(folder);  generator.generate(100, prompt);  prediction, state = generator.read(tokens, *generator.begin(batch))
    joint = load(folder);      joint.generate(["picture", "text"], {"text": 20}, given={"picture": tokens})

Neither knows the model's classes: it is the files alone that compute.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmlong.export.formats import ExportError, load_program

INFO = "export.json"


class Exported:
    """What was exported of a model.

    Args:
        folder: that ``mmlong export`` wrote.

    Attributes:
        info: what ``export.json`` says: modality, class names, and names, dtypes and shapes of every program.

    Raises:
        ExportError: no such export, a file that is missing or not the one that was written, or what runs it is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info: dict[str, Any] = _read(self.folder)
        self._programs = {name: self._load(entry) for name, entry in self.info["programs"].items()}

    def _load(self, entry: dict[str, Any]) -> Any:
        path = _checked(self.folder, entry)
        return load_program(path, entry["format"], entry["names"])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by number; empty where they are not known."""
        return list(self.info["class_names"])

    def run(self, name: str, *given: Tensor) -> tuple[Tensor, ...]:
        """Call a program by its name.

        Raises:
            ValueError: another number of inputs, another shape, or a size outside the bounds.
            TypeError: another dtype.
        """
        entry = self.info["programs"][name]
        ports = entry["inputs"]
        sizes: dict[str, int] = {}
        if len(given) != len(ports):
            raise ValueError(f"{name} takes {', '.join(entry['names'])}; {len(given)} tensors were given")
        for port, t in zip(ports, given, strict=True):
            if str(t.dtype).removeprefix("torch.") != port["dtype"]:
                raise TypeError(f"{port['name']} of {name} is {port['dtype']}, got {t.dtype}")
            wanted = port["shape"]
            fits = t.ndim == len(wanted) and all(
                isinstance(w, str) or w == n for w, n in zip(wanted, t.shape, strict=True)
            )
            if not fits:
                raise ValueError(f"{port['name']} of {name} is ({', '.join(map(str, wanted))}), got {tuple(t.shape)}")
            for word, size in zip(wanted, t.shape, strict=True):
                if isinstance(word, str) and word != "varies" and sizes.setdefault(word, size) != size:
                    raise ValueError(f"{port['name']} of {name} has {word} {size}, and another input {sizes[word]}")
        for word, (least, most) in entry["bounds"].items():
            if word in sizes and not least <= sizes[word] <= most:
                raise ValueError(f"{name} was exported for {word} {least} to {most}, got {sizes[word]}")
        return self._programs[name](*given)


class Predictor(Exported):
    """A model that looks at whole sequences."""

    def __call__(self, raw: Tensor, lengths: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Raw data to the prediction (or embedding), as ``info["prediction"]`` says.

        Args:
            raw: as the modality has it, right-padded where rows are uneven.
            lengths: int64 ``(B,)``, how much of each row is valid; ``None``: all of it.
            hidden: bool ``(B, L)``, of a masked model.

        Raises:
            ValueError: lengths where the model takes none or that do not fit, nothing hidden of a masked model, or see :meth:`Exported.run`.
            TypeError: another dtype.
        """
        takes = self.info["programs"]["predict"]["names"]
        for name, t in (("lengths", lengths), ("hidden", hidden)):
            if t is not None and name not in takes:
                raise ValueError(f"this model takes no {name}; it takes {', '.join(takes)}")
        if "lengths" in takes:
            if lengths is None:
                lengths = torch.full((raw.shape[0],), raw.shape[-1], dtype=torch.int64)
            elif lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= raw.shape[-1]:
                raise ValueError(f"lengths must be 0 .. {raw.shape[-1]}, got {lengths.tolist()}")
        if "hidden" in takes and hidden is None:
            raise ValueError("this model needs hidden, bool (B, L): which tokens it is to guess")
        (found,) = self.run("predict", *(t for t in (raw, lengths, hidden) if t is not None))
        return found


State = list[Tensor]


class Generator(Exported):
    """A model that makes sequences, token by token."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._begin = load_file(_checked(self.folder, self.info["begin"]))

    def begin(self, batch: int = 1) -> tuple[Tensor, State]:
        """What the first token may be, ``(B, 1, ...)``, and the state before it."""
        names = self.info["programs"]["step"]["names"][1:]
        prediction, *state = (
            self._begin[name].repeat(batch, *[1] * (self._begin[name].ndim - 1)) for name in ("prediction", *names)
        )
        return prediction, state

    def step(self, token: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, State]:
        """Take one token ``(B, 1, ...)``: what the next may be, and the state then."""
        prediction, *after = self.run("step", token, *state)
        return prediction, after

    def read(self, tokens: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, State]:
        """Take tokens ``(B, L, ...)``: what may follow each of them, ``(B, L, ...)``, and the state then."""
        if tokens.shape[1] == 1:
            return self.step(tokens, state)
        prediction, *after = self.run("read", tokens, *state)
        return prediction, after

    def encode(self, raw: Tensor) -> Tensor:
        """Raw data to tokens."""
        return self.run("encode", raw)[0]

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to raw data."""
        return self.run("decode", tokens)[0]

    def sample(self, prediction: Tensor) -> Tensor:
        """Draw a token ``(B, 1, ...)`` by torch's generator (``torch.manual_seed``)."""
        return self.run("sample", prediction)[0]

    def generate(self, length: int, prompt: Tensor | None = None, batch: int = 1) -> Tensor:
        """Draw tokens one after another.

        Args:
            length: how many.
            prompt: tokens ``(B, L, ...)`` to go on from; ``None``: from nothing.
            batch: rows, where there is no prompt.

        Returns:
            ``(B, L + length, ...)``, the prompt first.

        Raises:
            ValueError: nothing to make, or more tokens than a sample has.
        """
        begun = 0 if prompt is None else prompt.shape[1]
        whole = self.info["modality"]["tokens_per_sample"]
        if length < 1 or (whole is not None and begun + length > whole):
            raise ValueError(
                f"length is {length} after {begun} tokens; at least 1, and a sample has {whole or 'any number of'} tokens"
            )
        prediction, state = self.begin(batch if prompt is None else prompt.shape[0])
        tokens = [] if prompt is None else [prompt]
        if prompt is not None:
            prediction, state = self.read(prompt, state)
        for number in range(length):
            tokens.append(self.sample(prediction[:, -1:]))
            if number + 1 < length:
                prediction, state = self.step(tokens[-1], state)
        return torch.cat(tokens, 1)


class JointGenerator(Exported):
    """A joint model: spans of several modalities, each from those before it."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._begin = load_file(_checked(self.folder, self.info["begin"]))
        self.names = list(self.info["modalities"])
        self._state = self.info["programs"][f"{self.names[0]}.put"]["names"][1:]

    def begin(self, batch: int = 1) -> State:
        """The state before the first token of ``batch`` rows; any span may be first."""
        return [self._begin[name].repeat(batch, *[1] * (self._begin[name].ndim - 1)) for name in self._state]

    def open(self, state: Sequence[Tensor]) -> State:
        """The state with a span begun behind all that it has seen."""
        return [
            torch.zeros_like(t) if name == "state.passed" else t for name, t in zip(self._state, state, strict=True)
        ]

    def read(self, name: str, tokens: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, State]:
        """Take tokens ``(B, L, ...)`` of a modality: what was to be expected of each of them, and the state then."""
        if tokens.shape[1] == 1:
            prediction, before = self.peek(name, state)
            return prediction, self.put(name, tokens, before)
        prediction, *after = self.run(self._known(name, "read"), tokens, *state)
        return prediction, after

    def peek(self, name: str, state: Sequence[Tensor]) -> tuple[Tensor, State]:
        """What the next token may be, if it is of this modality, ``(B, 1, ...)``; and a state for :meth:`put` only."""
        prediction, *after = self.run(self._known(name, "peek"), *state)
        return prediction, after

    def put(self, name: str, token: Tensor, state: Sequence[Tensor]) -> State:
        """The state with a token ``(B, 1, ...)`` of this modality, from the one that :meth:`peek` gave."""
        return list(self.run(self._known(name, "put"), token, *state))

    def encode(self, name: str, raw: Tensor) -> Tensor:
        """Raw data of a modality to tokens."""
        return self.run(self._known(name, "encode"), raw)[0]

    def decode(self, name: str, tokens: Tensor) -> Tensor:
        """Tokens of a modality to raw data."""
        return self.run(self._known(name, "decode"), tokens)[0]

    def sample(self, name: str, prediction: Tensor) -> Tensor:
        """Draw a token ``(B, 1, ...)`` of a modality by torch's generator (``torch.manual_seed``)."""
        return self.run(self._known(name, "sample"), prediction)[0]

    def generate(
        self,
        order: Sequence[str],
        lengths: Mapping[str, int],
        given: Mapping[str, Tensor] | None = None,
        batch: int = 1,
    ) -> dict[str, Tensor]:
        """Spans one behind another: those that are given are read, the others drawn.

        Args:
            order: names of the spans.
            lengths: tokens in each span that is drawn; a modality of one fixed size knows its own.
            given: by name, tokens ``(B, L, ...)``.
            batch: rows, where nothing is given.

        Returns:
            tokens of every span, by name.

        Raises:
            ValueError: no such modality, or a span that is neither given nor has a length.
        """
        known = dict(given or {})
        if unused := [name for name in known if name not in order]:
            raise ValueError(f"{', '.join(unused)} is given, and the order has only {', '.join(order)}")
        state = self.begin(next(iter(known.values())).shape[0] if known else batch)
        for name in order:
            self._known(name, "read")
            state = self.open(state)
            if name in known:
                _, state = self.read(name, known[name], state)
                continue
            length = self.info["modalities"][name]["tokens_per_sample"] or lengths.get(name, 0)
            if length < 1:
                raise ValueError(f"how many tokens of {name} to draw is not said: lengths[{name!r}]")
            tokens = []
            for _ in range(length):
                prediction, state = self.peek(name, state)
                tokens.append(self.sample(name, prediction))
                state = self.put(name, tokens[-1], state)
            known[name] = torch.cat(tokens, 1)
        return {name: known[name] for name in order}

    def _known(self, name: str, program: str) -> str:
        if name not in self.names:
            raise ValueError(f"this model has no {name!r}; it has {', '.join(self.names)}")
        return f"{name}.{program}"


def load(folder: str | Path) -> Predictor | Generator | JointGenerator:
    """What ``mmlong export`` wrote, ready to be called. It is code, and runs: load only what you trust (:mod:`mmlong.export.formats`).

    Raises:
        ExportError: see :class:`Exported`.
    """
    info = _read(Path(folder))
    if "begin" not in info:
        return Predictor(folder)
    return JointGenerator(folder) if "modalities" in info else Generator(folder)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    if not path.is_file():
        raise ExportError(f"{folder} holds no export: {INFO} is missing. Make one with `mmlong export RUN`")
    try:
        info = json.loads(path.read_bytes())
        if not isinstance(info["programs"], dict):
            raise ValueError("programs is no table")
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is damaged: {error}") from error
    return info


def _checked(folder: Path, entry: dict[str, Any]) -> Path:
    """The file of an entry, if it is whole and in the folder."""
    path = folder / Path(entry["file"]).name
    if not path.is_file():
        raise ExportError(f"{path}: no such file; export the model anew")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise ExportError(f"{path} is not the file that was exported (its SHA-256 differs); export the model anew")
    return path
