"""The model card, ``README.md`` beside a saved model: what the model is and, from the folder of its run, how it came about.

The head is YAML as the Hugging Face hub reads it. What the run did not write down is left out, or said to be unknown where a reader would look for it. The licence of the weights is nobody's to
know but the author's, so it is there only if it was given; that of the data is what the data says of itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import mmlong
from mmlong.backbone.parts import level, name_and_times
from mmlong.models.model import Model
from mmlong.runs import CONFIG

CARD = "README.md"
SUMMARY = "summary.json"
UNKNOWN = "unknown"
_PIPELINES = {
    ("image", "classify"): "image-classification",
    ("audio", "classify"): "audio-classification",
    ("text", "classify"): "text-classification",
    ("text", "autoregressive"): "text-generation",
}


def model_card(model: Model, run: str | Path | None = None, license: str | None = None) -> str:
    """The text of a model card.

    Args:
        model: the model.
        run: folder of the run that trained it.
        license: of the weights, as the hub abbreviates it.

    Raises:
        FileNotFoundError: there is no such run: neither summary nor configuration.
        ValueError: one of them is damaged.
    """
    summary, config = ({}, {}) if run is None else _read(Path(run))
    title = str(summary.get("recipe") or config.get("recipe") or "A model of mmlong")
    parts = [_head(model, license), f"# {title}", _what(model), _use(model)]
    if run is not None:
        parts += [_training(summary, config), _data(summary, config), _results(summary, config), _machine(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    summary, config = run / SUMMARY, run / CONFIG
    if not summary.is_file() and not config.is_file():
        raise FileNotFoundError(f"{run} is no run folder: it has neither {SUMMARY} nor {CONFIG}")
    found: list[dict[str, Any]] = []
    for path, read in ((summary, json.loads), (config, yaml.safe_load)):
        try:
            content = read(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it holds {type(content).__name__}, not keys and values")
        found.append(content)
    return found[0], found[1]


def mixers_of(config: dict[str, Any]) -> list[str]:
    """Names of the mixers of a backbone's configuration, in the order in which they appear first."""
    found: dict[str, None] = {}

    def walk(spec: Any) -> None:
        if isinstance(spec, str):
            found.setdefault(name_and_times(spec)[0])
        elif isinstance(spec, dict):
            if "name" in spec:
                found.setdefault(str(spec["name"]))
            walk_all(spec.get("parts", []))
        elif isinstance(spec, list | tuple):
            written = level(spec)
            walk_all(spec if written is None else written["parts"])

    def walk_all(specs: Any) -> None:
        for one in specs:
            walk(one)

    walk_all(config.get("front", []))
    walk_all(config["parts"] or config["mixers"])
    return list(found)


def _head(model: Model, license: str | None) -> str:
    modality, kind = model.modality.kind, str(model.config.get("kind", "plain"))
    told: dict[str, Any] = {"library_name": "mmlong"}
    if license is not None:
        told["license"] = license
    does = "classify" if model.config["head"]["name"] in ("classify", "readout") else kind
    if (pipeline := _PIPELINES.get((modality, does))) is not None:
        told["pipeline_tag"] = pipeline
    tags = ["mmlong", modality, *([] if kind == "plain" else [kind]), *mixers_of(model.config["backbone"])]
    told["tags"] = list(dict.fromkeys(tag for tag in tags if tag))
    return f"---\n{yaml.safe_dump(told, sort_keys=False)}---"


def _what(model: Model) -> str:
    config = model.config
    modality = {key: value for key, value in config["modality"].items() if key != "name"}
    options = f" ({', '.join(f'{key} {value}' for key, value in modality.items())})" if modality else ""
    backbone = config["backbone"]
    shape = (
        f"parts `{json.dumps(backbone['parts'])}`, width {backbone['dim']}"
        if backbone["parts"]
        else f"width {backbone['dim']}, depth {backbone['depth']}"
        + (f", pooled by {backbone['pool']}" if backbone["pool"] else "")
    )
    length = model.modality.tokens_per_sample()
    tokens = f", {length:,} tokens a sample" if length is not None else ""
    weights = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            f"- reads: {config['modality']['name']}{options}{tokens}",
            f"- backbone: {', '.join(mixers_of(backbone))}; {shape}, direction {backbone['direction']}",
            f"- kind of model: {config.get('kind', 'plain')}; head: {config['head']['name']}",
            f"- parameters: {weights:,}",
        ]
    )


def _use(model: Model) -> str:
    run = f"tokens, layout = model.encode(raw)  # {_raw(model)}\ny, state = model(tokens, None, layout)"
    if model.class_names and model.config["head"]["name"] in ("classify", "readout"):
        run += "\nprint([model.class_names[number] for number in y.argmax(-1)])"
    return (
        "## Use\n\n```python\nimport mmlong\n\n"
        f'model = mmlong.load("FOLDER")  # this folder, or owner/name on the hub\n{run}\n```'
    )


def _raw(model: Model) -> str:
    """What is given to ``encode``, in a few words."""
    modality: Any = model.modality
    if modality.kind == "image":
        channels, height, width = modality.image
        return f"uint8 (B, {channels}, {height}, {width})"
    if modality.kind == "audio":
        shape = "(B, T)" if modality.sound_channels == 1 else f"(B, {modality.sound_channels}, T)"
        return f"float32 {shape}, full scale at -1 and 1, {modality.rate:,} Hz"
    return {"text": "uint8 (B, T), bytes", "genome": "uint8 (B, T), letters as ASCII"}.get(
        modality.kind, "raw tensors of the modality"
    )


def _training(summary: dict[str, Any], config: dict[str, Any]) -> str:
    task = config.get("model") or {}
    settings = task.get("init_args") or {}
    data = (config.get("data") or {}).get("init_args") or {}
    optim = {key: value for key, value in (settings.get("optim") or {}).items() if value not in (None, {}, 0.0)}
    lines = [
        ("command", _code(summary.get("command"))),
        ("objective", _code(task.get("class_path"))),
        ("steps", _number(summary.get("steps"))),
        ("batch size", _number(data.get("batch_size"))),
        ("seed", _number(config.get("seed_everything"))),
        ("optimiser", ", ".join(f"{key} {value}" for key, value in optim.items()) or None),
        ("weights", _weights(summary, settings)),
        ("began with the backbone of", _code(settings.get("backbone_from"))),
        ("time", None if "train_seconds" not in summary else f"{summary['train_seconds']:,} s"),
        ("tokens a second", _number(summary.get("tokens_per_second"))),
    ]
    told = [f"- {name}: {value}" for name, value in lines if value is not None]
    return "\n".join(["## Training\n", *told]) if told else ""


def _weights(summary: dict[str, Any], settings: dict[str, Any]) -> str | None:
    which = summary.get("weights")
    if which is None:
        return None
    decay = (settings.get("optim") or {}).get("ema")
    return f"{which}{f', averaged over training (decay {decay})' if decay else ''}"


def _data(summary: dict[str, Any], config: dict[str, Any]) -> str:
    told = summary.get("data") or {}
    given = ((config.get("data") or {}).get("init_args") or {}).get("dataset")
    # Of a folder its last name: where it lay is nobody's business.
    name = Path(str(told.get("name") or given or UNKNOWN)).name
    lines = [f"- dataset: {name}", f"- from: {told.get('source') or UNKNOWN}"]
    lines.append(f"- licence of the data: {told.get('licence') or UNKNOWN}")
    if classes := told.get("classes"):
        lines.append(f"- classes: {', '.join(map(str, classes))}")
    if skipped := summary.get("skipped_samples"):
        lines.append(f"- damaged samples were skipped {skipped:,} times")
    return "\n".join(["## Data\n", *lines])


def _results(summary: dict[str, Any], config: dict[str, Any]) -> str:
    measured = {key: value for key, value in summary.items() if key.startswith("test/")}
    if not measured:
        return "## Results\n\nNot tested, or the run did not keep what came out."
    rows = [f"| {key.removeprefix('test/')} | {value} |" for key, value in measured.items()]
    limit = (config.get("trainer") or {}).get("limit_test_batches")
    part = f", of which `limit_test_batches` {limit} were read" if limit not in (None, 1.0) else ""
    return "\n".join(["## Results\n", f"On the test split{part}:\n", "| metric | value |", "|---|---|", *rows])


def _machine(summary: dict[str, Any]) -> str:
    machine, versions = summary.get("machine") or {}, summary.get("versions") or {}
    memory = summary.get("peak_memory_bytes")
    lines = [
        ("device", summary.get("device")),
        ("GPU", machine.get("gpu")),
        ("processor", machine.get("processor")),
        ("cores", machine.get("cores")),
        ("system", machine.get("system")),
        ("ranks", summary.get("ranks")),
        ("threads", summary.get("threads")),
        ("peak memory", None if memory is None else f"{memory / 2**30:.2f} GiB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or UNKNOWN),
        ("commit of mmlong", summary.get("commit") or UNKNOWN),
        ("card written by", f"mmlong {mmlong.__version__}"),
    ]
    return "\n".join(["## Machine and software\n", *(f"- {name}: {value}" for name, value in lines if value)])


def _code(value: Any) -> str | None:
    return None if value is None else f"`{value}`"


def _number(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else None
