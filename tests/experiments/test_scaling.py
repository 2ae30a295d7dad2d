"""Scaling: the fit finds laws that are there, bits are those of the right tokens behind the right past, the command goes from sizes to a check."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.experiments.scaling import __main__ as scaling
from mmlong.experiments.scaling.context import bits_at, bits_between, bits_given, stretches
from mmlong.experiments.scaling.fit import PowerLaw, fit_power_law
from mmlong.experiments.scaling.subjects import SUBJECTS, Subject

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.cli.recipes import load_recipes
from mmlong.cli.train import check_config
from mmlong.cli.trial import Cost, Trial
from mmlong.cli.trial_table import Row, TrialTable
from mmlong.generation import score
from mmlong.models import AutoregressiveModel, build_model

# The fit

laws = st.builds(PowerLaw, st.floats(0.0, 3.0), st.floats(0.3, 5.0), st.floats(0.15, 1.5))


@given(laws, st.floats(-6, 18), st.floats(1.5, 8.0))
@settings(deadline=None, max_examples=40)
def test_a_law_is_recovered_from_five_points_and_foretells_a_sixth(law: PowerLaw, start: float, step: float) -> None:
    # Whatever the unit of x, the law is said of x / unit.
    unit = 10.0**start
    xs = [unit * step**number for number in range(6)]
    ys = [law(x / unit) for x in xs]
    found = fit_power_law(xs[:5], ys[:5])
    assert found.exponent == pytest.approx(law.exponent, rel=1e-3, abs=1e-4)
    assert found.floor == pytest.approx(law.floor, rel=1e-3, abs=2e-3 * ys[0])
    assert found(xs[5]) == pytest.approx(ys[5], rel=1e-4)
    for x, y in zip(xs, ys, strict=True):
        assert found(x) == pytest.approx(y, rel=1e-4)


@given(st.floats(0.3, 5.0), st.floats(0.05, 1.5))
@settings(deadline=None, max_examples=40)
def test_a_known_floor_needs_two_points(scale: float, exponent: float) -> None:
    law = PowerLaw(0.5, scale, exponent)
    found = fit_power_law([2.0, 9.0], [law(2.0), law(9.0)], floor=0.5)
    assert found(40.0) == pytest.approx(law(40.0), rel=1e-5)


@given(st.lists(st.floats(0.98, 1.02), min_size=5, max_size=5))
@settings(deadline=None, max_examples=40)
def test_noise_moves_it_little_and_nothing_nearby_is_better(noise: list[float]) -> None:
    law = PowerLaw(1.0, 2.0, 0.5)
    xs = [1.0, 4.0, 16.0, 64.0, 256.0]
    ys = [law(x) * factor for x, factor in zip(xs, noise, strict=True)]
    found = fit_power_law(xs, ys)

    def error(one: PowerLaw) -> float:
        return sum((one(x) / y - 1) ** 2 for x, y in zip(xs, ys, strict=True))

    assert error(found) <= error(law) + 1e-12
    for change in (0.999, 1.001):
        for field in ("floor", "scale", "exponent"):
            near = PowerLaw(**{**found.__dict__, field: getattr(found, field) * change})
            assert error(found) <= error(near) + 1e-12
    assert found(1024.0) == pytest.approx(law(1024.0), rel=0.1)


def test_what_does_not_fall_is_flat() -> None:
    level = fit_power_law([1, 2, 3, 4], [2.0, 2.0, 2.0, 2.0])
    assert [level(x) for x in (1, 3, 9)] == pytest.approx([2.0] * 3)
    rising = fit_power_law([1, 2, 3, 4], [1.0, 1.1, 1.2, 1.3])
    assert (rising.scale, rising.exponent) == (0.0, 0.0)
    assert 1.0 < rising.floor < 1.3


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 2]), ([1, 1, 2], [3, 2, 1]), ([1, 2, 0], [3, 2, 1]), ([1, 2, 3], [3, 2, -1]), ([1, 2, 3], [3, 2, math.nan]), ([1, 2, 3], [1, 2])]
)  # fmt: skip
def test_points_that_are_none(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="power law"):
        fit_power_law(x, y)


# What a model makes of its past


@pytest.fixture(scope="module")
def model() -> AutoregressiveModel:
    torch.manual_seed(0)
    made = build_model(
        {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 8, "depth": 1}, "head": {}}
    )
    assert isinstance(made, AutoregressiveModel)
    return made.double().eval()


def codes(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, 60), min_size=2, max_size=6, unique=True), st.integers(1, 70))
@settings(deadline=None, max_examples=25)
def test_bits_between_edges_are_those_of_each_token(model: AutoregressiveModel, edges: list[int], piece: int) -> None:
    tokens, edges = codes(60), sorted(edges)
    with torch.no_grad():
        chances = model(tokens, None, None)[0].log_softmax(-1)[0, torch.arange(60), tokens[0]] / -math.log(2)
    found = bits_between(model, tokens, edges, piece)
    for (low, high), (bits, count) in zip(itertools.pairwise(edges), found, strict=True):
        assert count == high - low
        assert bits == pytest.approx(float(chances[low:high].sum()), rel=1e-9)


def test_edges_that_are_none(model: AutoregressiveModel) -> None:
    for edges in ([0], [3, 2], [0, 0], [0, 61], [-1, 4]):
        with pytest.raises(ValueError, match="edges rise"):
            bits_between(model, codes(60), edges)


def test_positions_over_documents_of_any_length(model: AutoregressiveModel) -> None:
    documents = [codes(50, 1), codes(7, 2), codes(20, 3)]
    found = bits_at(model, documents, [0, 8, 16, 64, 128], 11)
    heads = [score(model, [tokens[:, :8]]) for tokens in documents]
    assert found[0] == pytest.approx(sum(bits for bits, _ in heads) / sum(count for _, count in heads))
    assert found[2] == pytest.approx(
        sum(bits_between(model, tokens, [16, tokens.shape[1]])[0][0] for tokens in (documents[0], documents[2])) / 38
    )
    assert found[3] is None


def test_behind_a_past_and_nothing_else(model: AutoregressiveModel) -> None:
    documents = [codes(90, 1), codes(80, 2)]
    targets = [(0, 64), (1, 40)]
    for past in (0, 3, 40):
        want = 0.0
        for document, first in targets:
            stretch = documents[document][:, first - past : first + 5]
            want += score(model, [stretch])[0] - (score(model, [stretch[:, :past]])[0] if past else 0.0)
        assert bits_given(model, documents, targets, 5, past, 7) == pytest.approx(want / 10)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(0, 50), st.integers(1, 20), st.integers(1, 8))
def test_stretches_have_their_past_and_do_not_overlap(lengths: list[int], before: int, width: int, count: int) -> None:
    places = sum(max(0, (length - before) // width) for length in lengths)
    if places < count:
        with pytest.raises(ValueError, match="ask for fewer"):
            stretches(lengths, before, width, count)
        return
    found = stretches(lengths, before, width, count)
    assert len(found) == count
    taken = {(document, first + k) for document, first in found for k in range(width)}
    assert len(taken) == count * width
    assert all(before <= first and first + width <= lengths[document] for document, first in found)


# Subjects and the command


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("debug", [False, True])
def test_every_size_is_a_backbone_that_streams(name: str, debug: bool) -> None:
    subject = scaling.debug_size(SUBJECTS[name]) if debug else SUBJECTS[name]
    config = load_recipes(list(subject.recipes))
    assert len(subject.dims) == len(subject.contexts) == scaling.FITTED + 1
    assert list(subject.dims) == sorted(set(subject.dims))
    assert list(subject.contexts) == sorted(set(subject.contexts))
    body = config["model"]["init_args"]["backbone"]
    given = {
        k.removeprefix("model.backbone."): v for k, v in subject.options.items() if k.startswith("model.backbone.")
    }
    for dim in subject.dims:
        assert Backbone(BackboneConfig(**{**body, **given, "dim": dim})).streaming
    check_config(config, Trial((), {**subject.options, "model.backbone.dim": 32}).words, name)


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A subject whose losses obey a law; (width, steps) of every size that is trained."""
    trained: list[tuple[int, int]] = []
    law = PowerLaw(1.0, 3.0, 0.25)

    def cost_of(self: TrialTable, trial: Trial, folder: Path, threads: int) -> Cost:
        dim = int(trial.options["model.backbone.dim"])
        return Cost(0.1, 100 * dim, 600 * dim, 50)

    def try_one(self: TrialTable, trial: Trial, setting: Any, folder: Path, steps: int, **more: Any) -> Row:
        dim = setting["dim"]
        trained.append((dim, steps))
        flops = 600.0 * dim * steps
        return Row(f"run{dim}", setting, 0, {"test/bits": law(flops / 1e6)}, steps, cpu_minutes=0.1, flops=flops, command=["mmlong", *trial.words])  # fmt: skip

    def look_back(subject: Subject, run: Path, args: Any) -> dict[str, Any]:
        looked.append(run)
        past = PowerLaw(2.0, 1.0, 0.5)
        return {"position": [[0, 8, 3.0], [8, 16, None]], "past": [[n, past(n)] for n in subject.contexts], "targets": {"width": 8, "count": 4}}  # fmt: skip

    looked: list[Path] = []
    monkeypatch.setattr(TrialTable, "cost_of", cost_of)
    monkeypatch.setattr(TrialTable, "try_one", try_one)
    monkeypatch.setattr(scaling, "look_back", look_back)
    monkeypatch.setattr(scaling, "looked", looked, raising=False)
    return trained


def test_from_sizes_to_a_check(
    synthetic: list[tuple[int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["text", "--runs", str(tmp_path / "r"), "--json", str(tmp_path / "f.json"), "--markdown", str(tmp_path / "f.md"), "--plot", str(tmp_path / "f.png")]  # fmt: skip
    assert scaling.main([*words, "--tokens-per-parameter", "5"]) == 0
    # 5 tokens for each of 100 dim parameters, 50 a step.
    assert synthetic == [(dim, 10 * dim) for dim in SUBJECTS["text"].dims]
    found = json.loads((tmp_path / "f.json").read_text())["found"]["text"]
    assert found["check"]["law"]["exponent"] == pytest.approx(0.25, rel=1e-3)
    assert found["check"]["off"] == pytest.approx(0, abs=1e-4)
    assert found["context"]["check"]["law"]["exponent"] == pytest.approx(0.5, rel=1e-3)
    assert "Of the sixth it says" in capsys.readouterr().out
    said = (tmp_path / "f.md").read_text()
    assert "## text: text/stdlib_ar, 5 tokens a parameter, seed 0" in said
    assert "| 16,384 | 2.0078 |" in said
    assert "0 to 8: 3.000." in said
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert scaling.main([*words, "--tokens-per-parameter", "5"]) == 0
    assert len(scaling.looked) == 1  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        scaling.main(["texts"])


@pytest.mark.slow
def test_a_debug_size_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLONG_DATA", str(tmp_path / "data"))
    words = ["text", "--debug", "--runs", str(tmp_path / "r"), "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.png")]  # fmt: skip
    assert scaling.main(words) == 0
    found = json.loads((tmp_path / "f.json").read_text())["found"]["text"]
    assert [one["dim"] for one in found["sizes"]] == list(scaling.DEBUG["dims"])
    assert all(0 < one["bits"] < 9 for one in found["sizes"])
    assert [past for past, _ in found["context"]["past"]] == list(scaling.DEBUG["contexts"])
