"""What a joint model makes of one modality from another, judged by a trained classifier: the sound of a picture, is it the digit that is shown?

``python -m mmlong.experiments.joint.judge RUN --given picture --as sound --classifier audio/digits8k [--count 50] [--length 4096] [--seed 0] [--json FILE] [--KEY VALUE ...]``

The first ``count`` test pairs of the run's own data are taken: what is given is read, the other span is drawn, decoded, and shown to the classifier, a run that reads that kind of raw data (of sounds, at that rate). Right is the class of
the pair, by its name. Beside it stand what the same classifier says of the real partners, cut to the same length, which is the most that can be hoped for, and of what is drawn after nothing, which is chance. Other keys (``--data.source_path``)
override both runs' data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmlong.datamodules.pairs import PairDataModule
from mmlong.experiments.command import experiment_parser, keep
from torch import Tensor

from mmlong.cli.build import build, parse
from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes
from mmlong.cli.runs import saved_model
from mmlong.cli.train import hush
from mmlong.generation import evaluating, generate_spans
from mmlong.heads import Sampling
from mmlong.models import JointModel, Model
from mmlong.runs import CONFIG

ROWS = 20
"""Pairs that are drawn and judged at a time."""


def data_of(folder: Path, overrides: list[str]) -> Any:
    """The datamodule that a run was trained on.

    Raises:
        CommandError: the folder says nothing of it.
    """
    if not (folder / CONFIG).is_file():
        raise CommandError(f"{folder} has no {CONFIG}, which says what data it was trained on: name a run folder")
    return build(*parse(load_recipes([str(folder / CONFIG)]), overrides))[0]


def check_reads(classifier: Model, joint: JointModel, name: str) -> None:
    """Raise ``CommandError`` unless a classifier reads the raw data of a joint model's modality."""
    if name not in joint.names:
        raise CommandError(f"the joint model has no {name!r}; it has {', '.join(joint.names)}")
    if classifier.config.get("kind", "plain") != "plain" or classifier.head.per_token:
        raise CommandError("the classifier is no model that says one thing of a whole sequence: name a run of ClassifyTask")  # fmt: skip
    made, read = joint.voices[name].modality, classifier.modality
    for what in ("kind", "rate", "sound_channels", "image"):
        ours, theirs = getattr(made, what, None), getattr(read, what, None)
        if ours != theirs:
            raise CommandError(f"{name} has {what} {ours}, and the classifier reads {theirs}: take one that was trained on such data")  # fmt: skip


@torch.inference_mode()
def judge(classifier: Any, raw: Tensor, lengths: Tensor | None, names: Sequence[str]) -> list[str]:
    """Names of the likeliest classes of raw data."""
    tokens, layout = classifier.encode(raw, lengths)
    return [names[number] for number in classifier(tokens, None, layout)[0].argmax(-1).tolist()]


def first_pairs(samples: Any, count: int) -> list[dict[str, Any]]:
    """The first pairs of a split, ``ROWS`` at a time."""
    count = min(count, len(samples))
    return [
        samples.fetch([(0, place, 1.0) for place in range(first, min(first + ROWS, count))])[0]
        for first in range(0, count, ROWS)
    ]


def run(joint: JointModel, classifier: Any, data: Any, names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    """Draw and judge.

    Args:
        joint, classifier: in evaluation mode.
        data: of the joint model.
        names: of the classifier's classes.
        args: of the command.

    Returns:
        how many of how many are right, for each of what was judged.
    """
    before, after = joint.voices[args.given].modality, joint.voices[args.speaks].modality
    classes = list(data.lead.class_names)
    if unknown := [name for name in classes if name not in names]:
        raise CommandError(f"the pairs are of class {', '.join(unknown)}, and the classifier knows {', '.join(names)}")
    draw = torch.Generator().manual_seed(args.seed)
    right = {f"{args.speaks} of a {args.given}": 0, f"{args.speaks} of nothing": 0, f"real {args.speaks}": 0}
    sampling, total = Sampling(args.temperature), 0
    whole = after.tokens_per_sample()
    for batch in first_pairs(data.samples("test", False), args.count):
        truth = [classes[label] for label in batch["label"].tolist()]
        parts = batch["parts"]
        if "lengths" in parts[args.given] and len(set(parts[args.given]["lengths"].tolist())) > 1:
            raise CommandError(f"what is given is read as rows of one length, and {args.given} has uneven ones: give the other")  # fmt: skip
        tokens = before.encode(parts[args.given]["raw"])[0]
        length = args.length or whole or parts[args.speaks]["raw"].shape[-1]
        lengths = {args.speaks: length}
        order = [args.given, args.speaks]
        made = generate_spans(joint, order, lengths, {args.given: tokens}, sampling=sampling, generator=draw)
        alone = generate_spans(joint, [args.speaks], lengths, batch=len(truth), sampling=sampling, generator=draw)
        real, valid = parts[args.speaks]["raw"], parts[args.speaks].get("lengths")
        if whole is None:
            real, valid = real[..., :length], None if valid is None else valid.clamp_max(length)
        shown: list[tuple[Tensor, Tensor | None]] = [
            (after.decode(made[args.speaks]), None),
            (after.decode(alone[args.speaks]), None),
            (real, valid),
        ]
        for what, (raw, ends) in zip(right, shown, strict=True):
            found = judge(classifier, raw, ends, names)
            right[what] += sum(one == other for one, other in zip(found, truth, strict=True))
        total += len(truth)
    return {"count": total, "classes": len(classes), "right": right}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = experiment_parser("joint.judge", __doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="of a joint model on pairs, or a recipe's name (its newest run)")
    parser.add_argument("--given", required=True, metavar="NAME", help="the modality that is read")
    parser.add_argument("--as", dest="speaks", required=True, metavar="NAME", help="the modality that is made")
    parser.add_argument("--classifier", required=True, metavar="RUN", help="of a classifier that reads what is made")
    parser.add_argument("--count", type=int, default=50, help="test pairs (default 50)")
    parser.add_argument("--length", type=int, help="tokens to draw (default: those of the longest real one)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args, overrides = parser.parse_known_args(argv)
    if args.count < 1 or (args.length is not None and args.length < 1):
        parser.error("--count and --length are at least 1")
    hush()
    try:
        joint, folder = saved_model(args.run, args.runs)
        classifier, judged_by = saved_model(args.classifier, args.runs)
        if not isinstance(joint, JointModel):
            raise CommandError(f"{folder} holds no joint model")
        joint.speaking(args.given)  # refuses what it does not have
        check_reads(classifier, joint, args.speaks)
        data, other = data_of(folder, overrides), data_of(judged_by, overrides)
        if not isinstance(data, PairDataModule):
            raise CommandError(f"{folder} was not trained on pairs, so there is nothing to hold what is made against")
        data.prepare_data()
        data.setup("test")
        with evaluating(classifier):
            found = run(joint, classifier, data, list(other.info()["class_names"]), args)
    except (CommandError, ValueError) as error:
        print(f"judge: {error}", file=sys.stderr)
        return 1
    for what, right in found["right"].items():
        print(f"{what}: {right} of {found['count']} are taken for what they should be ({right / found['count']:.3f})")
    print(f"chance: {1 / found['classes']:.3f}")
    keep(args.json, {"run": str(folder), "classifier": str(judged_by), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
