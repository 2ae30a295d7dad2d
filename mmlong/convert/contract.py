"""What a converter is: a published family's configuration as one of ours, and a table of names.

    @register_converter("gpt2")
    class GPT2(Converter):
        def config(self, p, kind): ...      their config.json to a configuration of ours
        def rows(self, p): ...              names of their tensors and of ours (mmlong.convert.table)

The table is read in both directions, so nothing is written twice; a model goes back by the configuration that it came with, if that still says what the model is. Other people's packages add theirs by the entry-point
group ``mmlong.converters``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from mmlong.convert.table import Row
from mmlong.models import Config
from mmlong.registry import Registry


class ConvertError(ValueError):
    """A folder that cannot be converted; the message says what, where, and what to do."""


class Published:
    """A published ``config.json``, asked for what is needed of it.

    Args:
        config: its content.
        options: what it leaves open and is settled here (:attr:`Converter.options`).
    """

    def __init__(self, config: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        self.config, self.options = config, options or {}

    def __getitem__(self, key: str) -> Any:
        """A value that there must be.

        Raises:
            ConvertError: there is none.
        """
        if key not in self.config:
            raise ConvertError(f"config.json lacks {key!r}, by which the model's size or form is known")
        return self.config[key]

    def get(self, key: str, default: Any) -> Any:
        """A value, or what a configuration without it means; null counts as left out."""
        value = self.config.get(key)
        return default if value is None else value

    def must(self, key: str, wanted: Any, why: str) -> None:
        """Refuse a value that ours has no form for.

        Args:
            key: that may be left out.
            wanted: the only value, which is also the default.
            why: what ours has, as a clause.

        Raises:
            ConvertError: another value.
        """
        found = self.get(key, wanted)
        if found != wanted:
            raise ConvertError(f"config.json: {key} is {found!r}, and only {wanted!r} can be converted: {why}")

    def activation(self, key: str, default: str) -> str:
        """An activation, by our name for it.

        Raises:
            ConvertError: one that ours has not.
        """
        name = self.get(key, default)
        if name not in ACTIVATION_NAMES:
            raise ConvertError(
                f"config.json: {key} is {name!r}; activations that can be converted: {', '.join(ACTIVATION_NAMES)}"
            )
        return ACTIVATION_NAMES[name]


ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}
"""Activations as ``transformers`` names them, and as :mod:`mmlong.ops.activations` does."""


class Converter:
    """Base of every converter.

    Attributes:
        reads: which model it converts, for people.
        note: what to know of it.
        prefix: before the names of the model without its head, which files of such a model leave out.
        unused: patterns of tensors that such models have and that change no output, and why; they are kept beside and given back.
        kinds: of ours that it can become, the usual one first (:data:`mmlong.models.KINDS`).
        options: names of what theirs leaves open and is settled at a call there, which :attr:`Published.options` may have.
    """

    reads: ClassVar[str] = ""
    note: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    unused: ClassVar[Mapping[str, str]] = {}
    kinds: ClassVar[tuple[str, ...]] = ("plain",)
    options: ClassVar[tuple[str, ...]] = ()

    def config(self, p: Published, kind: str) -> Config:
        """The configuration of ours.

        Args:
            p: theirs.
            kind: one of ``kinds``.

        Raises:
            ConvertError: ours has no such form.
        """
        raise TypeError(f"{type(self).__name__} does not define config(p, kind)")

    def rows(self, p: Published) -> Iterable[Row]:
        """Names of theirs, with ``prefix``, and of ours."""
        raise TypeError(f"{type(self).__name__} does not define rows(p)")

    def same(self, p: Published) -> Mapping[str, str]:
        """Names under which some files have a tensor once more, and the name that the table has it by."""
        return {}

    def check(self, p: Published, theirs: Mapping[str, Any]) -> None:
        """Refuse tensors whose numbers say what ours has no form for."""


CONVERTERS: Registry[Converter] = Registry("published model type", group="mmlong.converters")
"""By ``model_type`` of ``config.json``."""


def register_converter(model_type: str) -> Callable[[type[Converter]], type[Converter]]:
    """Class decorator: the converter of configurations of this ``model_type``."""

    def add(cls: type[Converter]) -> type[Converter]:
        CONVERTERS.register(model_type)(cls())
        return cls

    return add


def causal_config(p: Published, kind: str, start: Any, modality: Config, backbone: Config, head: Config) -> Config:
    """A language model's configuration, of one of two kinds.

    Args:
        p: theirs.
        kind: ``autoregressive``, where the code ``start`` stands before the first token, or ``plain``, whose prediction at a token is of the next one, as theirs.
        start: the code, or ``None``.
        modality, backbone, head: of ours; the modality's name and number of codes are filled in where they are left out.

    Raises:
        ConvertError: an autoregressive model without a code to begin with.
    """
    modality = {"name": "tokens", "codes": p["vocab_size"], **modality} if "codes" not in modality else modality
    known = modality["codes"] + modality.get("special", 0)
    config = {"modality": modality, "backbone": backbone, "head": {"name": "categorical", "bias": False, **head}}
    if kind == "plain":
        return {**config, "head": {**config["head"], "num_classes": modality["codes"]}, "kind": kind}
    if not isinstance(start, int) or not 0 <= start < known:
        raise ConvertError(
            f"config.json: bos_token_id is {start!r}, and an autoregressive model begins with a code (0 .. {known - 1}): convert it to the plain kind (--kind plain)"
        )
    return {**config, "kind": kind, "start": start}
