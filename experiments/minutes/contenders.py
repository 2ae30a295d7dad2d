"""Who takes part, recipe by recipe: the recipe as it is, the simple models of its field, the same backbone with other people's layers, and five other mixers.

What is trained is options of ``mmlong fit`` beside the recipe's, so data, split, augmentation, optimiser, averaging and evaluation are the recipe's unless an option says otherwise. What is only computed is a program of :mod:`mmlong.experiments.minutes.simple`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmlong.backbone.parts import repeated
from mmlong.registry import nearest

Kind = Literal["default", "simple", "peers", "mixer"]
KINDS: tuple[Kind, ...] = ("default", "simple", "peers", "mixer")


@dataclass(frozen=True)
class Contender:
    """One side.

    Attributes:
        name: for the table.
        kind: which of the four sorts it is.
        options: of ``mmlong fit``, of what is trained.
        program: words behind ``python -m mmlong.experiments.minutes.simple``, of what is computed.
    """

    name: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    program: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A recipe's table.

    Attributes:
        metric: of the test split, that decides.
        networks: simple models that are trained, by name.
        programs: simple models that are computed, and of what.
        mixers: five of mmlong's, each as ``backbone.mixers`` takes them.
        minutes: CPU minutes of each, unless told. A table is three times nine trainings, so these are what an evening holds and not what a recipe takes to its end.
        peers: options beside the peers' layers.
    """

    metric: str
    networks: tuple[str, ...]
    programs: tuple[tuple[str, ...], ...]
    mixers: Mapping[str, list[Any]]
    minutes: float
    peers: Mapping[str, Any] = field(default_factory=dict)


PEERS = {"mamba2": "mamba2-transformers", "local": "local-attention"}
"""Mixer to the peer (:mod:`mmlong.bench.peers`) that takes its place; others stay."""

_BODY = "model.backbone."
_PLAIN = {
    f"{_BODY}front": [],
    f"{_BODY}pool": [],
    f"{_BODY}depth": 0,
    f"{_BODY}mixers": ["s4d"],
    f"{_BODY}norm": "layer",
    f"{_BODY}reverse_complement": False,
}
"""A backbone of nothing but a norm, behind which the recipe's head stands."""


def _timm(model: str, side: int, dim: int, lr: float, options: dict[str, Any]) -> dict[str, Any]:
    """A network of timm: the whole picture is its one patch, its pooled features the one token."""
    modality = {"name": "timm_patches", "model": model, "patch": side, "options": options}
    return {**_PLAIN, f"{_BODY}dim": dim, "model.modality": modality, "model.head": {"name": "classify"}, "model.optim.lr": lr}  # fmt: skip


def _conv(task: str, dim: int) -> dict[str, Any]:
    """A convolutional network of :mod:`mmlong.experiments.minutes.conv`."""
    return {
        "model.class_path": f"mmlong.experiments.minutes.conv.{task}", **_PLAIN, f"{_BODY}dim": dim,
        "model.head": {"name": "classify", "pool": "max"}, "model.optim.lr": 0.002,
    }  # fmt: skip


def _network(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a simple model that is trained, for a merged recipe."""
    side = int(config["data"]["init_args"].get("size") or 256)
    known = {
        "timm resnet10t": lambda: _timm("resnet10t", side, 128, 1e-3, {}),
        "timm resnet18": lambda: _timm("resnet18", side, 128, 1e-3, {}),
        "timm vit_tiny": lambda: _timm("vit_tiny_patch16_224", side, 192, 5e-4, {"img_size": side}),
        "convolutions on log-mel": lambda: _conv("LogMelTask", 96),
        "convolutions on tokens": lambda: _conv("TokenConvTask", 96),
    }
    return known[name]()


_NARROW = {"expand": 1, "d_state": 16, "headdim": 16}
_CLASSIFY: dict[str, list[Any]] = {
    "s4d": ["s4d"],
    "s5": ["s5"],
    "gla": ["gla"],
    "mlstm": ["mlstm"],
    "gated_deltanet": ["gated_deltanet"],
}
_PHOTO = {"name": "masked_conv2d", "width": 64, "radius": 2}
_NEAR = {"name": "local", "window": 512}
_ROW = {"name": "masked_conv2d", "radius": 1, "relu": True}
_CELLS: dict[str, list[Any]] = {
    name: [*([{**_ROW, "width": width}] for width in (256, 128, 64, 32)), [{**_ROW, "width": 16, "repeat": 3}, name]]
    for name in _CLASSIFY
}
"""The convolutions of the recipe stay, as they do in the arena."""
_PICTURES = ("timm resnet10t", "timm resnet18", "timm vit_tiny")
_WHOLE = {"model.segment": None, "data.eval_length": 8192, "data.eval_batch_size": 1}
"""For peers, which carry no state: rows of evaluation are run whole, as long as that allows."""

SUBJECTS: dict[str, Subject] = {
    "image/cells256": Subject("test/accuracy", _PICTURES, (("linear", "thumbnails"),), _CLASSIFY, 3),
    "image/defects256": Subject(
        "test/balanced_accuracy", _PICTURES, (("linear", "thumbnails"), ("boosting", "thumbnails")), _CELLS, 6
    ),
    "image/photo_ar": Subject(
        "test/bits",
        (),
        (("webp",), ("png",)),
        {
            f"masked_conv2d and {name}": [_PHOTO, name]
            for name in ("s4d", "gla", "mlstm", "gated_deltanet", "rg_lru")
        },
        8,
    ),
    "audio/digits8k": Subject(
        "test/accuracy", ("convolutions on log-mel",), (("linear", "mfcc"), ("boosting", "mfcc")), _CLASSIFY, 8
    ),
    "audio/percussion": Subject(
        "test/accuracy", ("convolutions on log-mel",), (("linear", "mfcc"), ("boosting", "mfcc")), _CLASSIFY, 4
    ),
    "genome/chromosome_ar": Subject(
        "test/bits",
        (),
        (("markov",), ("ppmd",), ("ppmd", "primed"), ("xz",)),
        {
            "mamba2": [{"name": "mamba2", **_NARROW, "headdim": 32}],
            "s4d and gla": ["s4d", "gla"],
            "s4d and mlstm": ["s4d", "mlstm"],
            "s4d and gated_deltanet": ["s4d", "gated_deltanet"],
            "s4d and local": ["s4d", _NEAR],
        },
        6,
        {**_WHOLE, "data.eval_batch_size": 4},
    ),
    "genome/binding200": Subject(
        "test/accuracy", ("convolutions on tokens",), (("linear", "kmers"), ("boosting", "kmers")),
        {**{name: _CLASSIFY[name] for name in ("s4d", "gla", "mlstm", "gated_deltanet")}, "attention": ["attention"]}, 4,
    ),
    "genome/families": Subject(
        "test/accuracy", ("convolutions on tokens",), (("linear", "kmers"), ("boosting", "kmers")),
        {**{name: _CLASSIFY[name] for name in ("s4d", "gla", "mlstm", "gated_deltanet")}, "local": [_NEAR]}, 4,
    ),
    "text/stdlib_ar": Subject(
        "test/bits",
        (),
        (("ppmd",), ("ppmd", "primed"), ("bz2",), ("xz",), ("xz", "primed")),
        {
            f"{name} and local": [name, _NEAR]
            for name in ("gla", "mlstm", "gated_deltanet", "rg_lru")
        } | {"attention": ["attention"]},
        8,
        _WHOLE,
    ),
    "text/news": Subject(
        "test/accuracy", (), (("linear", "char_ngrams"),),
        {**{name: _CLASSIFY[name] for name in ("s4d", "gla", "mlstm", "gated_deltanet")}, "local": [_NEAR]}, 4,
    ),
}  # fmt: skip
"""By recipe."""


def with_peers(mixers: Any) -> Any:
    """The same mixers with every one that has a peer replaced by it, its options kept; lists as deep as they are."""
    if isinstance(mixers, list):
        return [with_peers(one) for each in mixers for one in repeated(each)]
    spec = {"name": mixers} if isinstance(mixers, str) else dict(mixers)
    if spec["name"] not in PEERS:
        return mixers
    return {**spec, "name": "peer", "peer": PEERS[spec["name"]]}


def contenders(recipe: str, config: Mapping[str, Any]) -> list[Contender]:
    """All that take part in a recipe's table.

    Args:
        recipe: its name.
        config: its merged content; a debug size may be on top.

    Raises:
        ValueError: there is no table for it.
    """
    if recipe not in SUBJECTS:
        raise ValueError(
            f"there is no table of {recipe!r}{nearest(recipe, SUBJECTS)}; there is one of {', '.join(SUBJECTS)}"
        )
    subject = SUBJECTS[recipe]
    model = config["model"]
    quiet = {"model.samples": 0} if model["class_path"].endswith("AutoregressTask") else {}
    task = "PeerAutoregressTask" if quiet else "PeerClassifyTask"
    replaced = {
        "model.class_path": f"mmlong.experiments.minutes.peers.{task}", **quiet, **subject.peers,
        f"{_BODY}mixers": with_peers(model["init_args"]["backbone"]["mixers"]),
    }  # fmt: skip
    return [
        Contender("the recipe", "default", quiet),
        *(Contender(name, "simple", _network(name, config)) for name in subject.networks),
        *(Contender(" of ".join(words), "simple", program=words) for words in subject.programs),
        Contender("other people's layers", "peers", replaced),
        *(Contender(name, "mixer", {**quiet, f"{_BODY}mixers": spec}) for name, spec in subject.mixers.items()),
    ]
