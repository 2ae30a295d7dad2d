"""Equal minutes: who takes part can be built and trained, simple models are right, other people's layers keep what of the contract they claim, rows are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmlong.experiments.minutes import __main__ as minutes
from mmlong.experiments.minutes import conv, peers, simple
from mmlong.experiments.minutes.contenders import SUBJECTS, Contender, Subject, contenders, with_peers

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.bench.peers import PEERS
from mmlong.cli.build import build, parse
from mmlong.cli.recipes import load_recipes
from mmlong.cli.train import check_config
from mmlong.cli.trial import Trial, TrialFailedError
from mmlong.cli.trial_table import Row, TrialTable
from mmlong.estimate.step import TrainingStep, synthetic_batch
from mmlong.layout import Layout
from mmlong.mixers import MIXERS, list_mixers
from mmlong.models import KINDS

RECIPES = ["image/cells256", "image/defects256", "image/photo_ar", "audio/digits8k", "audio/percussion", "genome/chromosome_ar",
           "genome/binding200", "genome/families", "text/stdlib_ar", "text/news"]  # fmt: skip


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered here stays here."""
    monkeypatch.setattr(MIXERS, "_entries", {name: MIXERS[name] for name in list_mixers()})
    monkeypatch.setattr(KINDS, "_entries", {name: KINDS[name] for name in KINDS.names()})


def of(recipe: str, name: str, debug: bool = True) -> tuple[dict[str, Any], Contender]:
    config = load_recipes([recipe, f"{recipe}.debug"] if debug else [recipe])
    return config, next(one for one in contenders(recipe, config) if one.name == name)


def task_of(recipe: str, name: str) -> tuple[Any, dict[str, Any]]:
    """A contender's task at the debug size, and a batch of its shapes."""
    config, one = of(recipe, name)
    _, task = build(*parse(config, Trial((), one.options).words))
    init = config["data"]["init_args"]
    length = task.model.modality.tokens_per_sample() or init.get("length") or 200
    torch.manual_seed(0)
    return task, synthetic_batch(task, 3, length, init.get("windows") == "stream")


def test_every_recipe_of_the_issue_has_a_table_with_all_four_sorts() -> None:
    assert list(SUBJECTS) == RECIPES
    for recipe in RECIPES:
        found = contenders(recipe, load_recipes([recipe]))
        kinds = [one.kind for one in found]
        assert kinds.count("default") == 1
        assert kinds.count("simple") >= 1
        assert kinds.count("peers") == 1
        assert kinds.count("mixer") == 5
        assert len({one.name for one in found}) == len(found)
        assert all(bool(one.program) != (bool(one.options) or one.kind == "default") for one in found)
    with pytest.raises(ValueError, match="did you mean 'text/news'"):
        contenders("text/newz", {})


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_are_keys_and_mixers_make_a_backbone_like_the_recipes(recipe: str) -> None:
    config = load_recipes([recipe])
    body = config["model"]["init_args"]["backbone"]
    for one in contenders(recipe, config):
        if one.program:
            continue
        check_config(config, Trial((), one.options).words[:], recipe)
        if one.kind == "mixer":
            made = Backbone(BackboneConfig(**{**body, "mixers": one.options["model.backbone.mixers"]}))
            assert made.causal == made.streaming == (body["direction"] == "causal")
            assert made.num_features == (body["dim"] if isinstance(body["dim"], int) else body["dim"][-1])


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("image/cells256", "timm resnet10t"),
        ("image/cells256", "timm vit_tiny"),
        ("audio/percussion", "convolutions on log-mel"),
        ("genome/binding200", "convolutions on tokens"),
        ("genome/families", "convolutions on tokens"),
        ("audio/percussion", "other people's layers"),
        ("genome/binding200", "other people's layers"),
        ("text/stdlib_ar", "other people's layers"),
        ("image/photo_ar", "other people's layers"),
    ],
)
def test_it_learns_its_batch(recipe: str, name: str) -> None:
    if name.startswith("other"):
        pytest.importorskip("transformers")
        pytest.importorskip("local_attention")
    task, batch = task_of(recipe, name)
    step = TrainingStep(task, {"gradient_clip_val": 1.0, "max_steps": 1000})
    first = float(step.forward(batch).detach())
    for _ in range(6):
        step(batch)
    assert float(step.forward(batch).detach()) < first
    if name.startswith("timm"):
        assert task.model.modality.tokens_per_sample() == 1  # the network sees the whole picture


def test_nothing_is_registered_by_importing_it() -> None:
    assert "peer" not in MIXERS
    assert not {"token_conv", "log_mel_conv"} & set(KINDS.names())


# Other people's layers


def test_a_mixer_with_a_peer_is_replaced_and_keeps_its_options() -> None:
    assert with_peers([["s4d", {"name": "mamba2", "expand": 1}], ["local"]]) == [
        ["s4d", {"name": "peer", "peer": "mamba2-transformers", "expand": 1}],
        [{"name": "peer", "peer": "local-attention"}],
    ]


@pytest.fixture
def peer() -> peers.PeerMixer:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return peers.PeerMixer(16, peer="mamba2-transformers", expand=1, d_state=8, headdim=8).eval()


def test_a_peer_is_the_mixer_with_its_weights(peer: peers.PeerMixer) -> None:
    torch.manual_seed(0)
    ours = PEERS["mamba2-transformers"].pair(16, {"expand": 1, "d_state": 8, "headdim": 8}).ours
    x = torch.randn(2, 37, 16)
    torch.testing.assert_close(peer(x)[0], ours(x)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_peer_in_pieces_with_padding_and_with_documents(peer: peers.PeerMixer) -> None:
    x = torch.randn(3, 21, 16)
    whole, _ = peer(x)
    state, parts = None, []
    for piece in x.split([5, 1, 15], 1):
        y, state = peer(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    lengths = torch.tensor([21, 4, 9])
    padded, _ = peer(
        torch.where(torch.arange(21)[None, :, None] < lengths[:, None, None], x, 7.0), None, Layout(lengths=lengths)
    )
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(padded[row, :length], whole[row, :length])
    resets = torch.zeros(3, 21, dtype=torch.bool)
    resets[0, 8] = resets[2, 3] = resets[2, 8] = True
    packed, _ = peer(x, None, Layout(resets=resets))
    torch.testing.assert_close(packed[0, 8:], peer(x[:1, 8:])[0][0])
    torch.testing.assert_close(packed[2, 3:8], peer(x[2:, 3:8])[0][0])
    with pytest.raises(ValueError, match="full rows of one document"):
        peer(x, state, Layout(resets=resets))


def test_peers_that_do_not_fit_are_refused() -> None:
    pytest.importorskip("transformers")
    for name, why in (("longformer", "sees both sides"), ("minimax", "more than the tokens")):
        with pytest.raises(ValueError, match=why):
            peers.PeerMixer(16, peer=name)


# Convolutions


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(("recipe", "name"), [("audio/percussion", "convolutions on log-mel"), ("genome/families", "convolutions on tokens")])  # fmt: skip
@torch.no_grad()
def test_padding_changes_no_prediction(recipe: str, name: str) -> None:
    model = task_of(recipe, name)[0].model.eval()
    for part in model.modules():  # norms that have seen something
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_()
            part.bias.normal_()
    rows = [1213, 64, 700]
    raw, *_ = model.modality.example(3, max(rows), torch.Generator().manual_seed(0))
    together = model(*with_layout(model, raw, torch.tensor(rows)))[0]
    for row, length in enumerate(rows):
        alone = model(*with_layout(model, raw[row : row + 1, :length], None))[0]
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def with_layout(model: Any, raw: torch.Tensor, lengths: torch.Tensor | None) -> tuple[Any, None, Any]:
    tokens, layout = model.encode(raw, lengths)
    return tokens, None, layout


@pytest.mark.usefixtures("registries")
@torch.no_grad()
def test_a_tone_is_in_its_band_of_the_mel_energies() -> None:
    model = task_of("audio/percussion", "convolutions on log-mel")[0].model
    time = torch.arange(8000) / model.modality.rate
    energies = model.spectrum(torch.sin(2 * torch.pi * 440 * time)[None])
    assert energies.shape == (1, conv.BANDS, 8000 // model.hop + 1)
    # Bands are equally far apart in mel, from 0 to half the rate.
    mel = [2595 * np.log10(1 + f / 700) for f in (440, model.modality.rate / 2)]
    assert int(energies[0, :, 10].argmax()) == pytest.approx(mel[0] / mel[1] * (conv.BANDS + 1) - 1, abs=1)


# Simple models


class Says:
    """A model that says a label to every sample, and of which it is known how often it was asked."""

    asked = 0

    def __init__(self, label: int) -> None:
        self.label = label

    def fit(self, x: Any, y: Any) -> Says:
        return self

    def predict(self, x: Any) -> np.ndarray:
        Says.asked += 1
        return np.full(len(x), self.label)


def test_what_is_best_on_validation_is_tested_once() -> None:
    labels = {"train": [0], "val": [0, 1, 1, 1], "test": [0, 0, 0, 1, 2]}
    parts = {split: (np.zeros((len(y), 1)), np.array(y)) for split, y in labels.items()}
    models = [(str(label), lambda label=label: Says(label)) for label in (0, 1, 2)]
    Says.asked = 0
    found, chosen = simple.classify(parts, models, "accuracy", simple.Clock())
    assert chosen == "1"
    assert (found["val/accuracy"], found["test/accuracy"]) == (0.75, 0.2)
    assert found["val/balanced_accuracy"] == 0.5
    assert found["test/balanced_accuracy"] == pytest.approx(1 / 3)
    assert Says.asked == 3 + 2


def test_settings_are_tried_while_the_minutes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(simple.time, "process_time", lambda: now[0])
    tried = []
    for setting in simple.Clock(1.0).while_it_lasts([20.0, 15.0, 10.0, 1.0]):
        tried.append(setting)
        now[0] += setting
    assert tried == [20.0, 15.0, 10.0]  # another of 20 seconds would end at 65
    assert list(simple.Clock(None).while_it_lasts(range(9))) == list(range(9))


def test_bits_of_documents_alone_and_given_others() -> None:
    documents, given = [b"ab", b"cdef"], [b"xyz"]
    assert simple.bits_each(lambda data: len(data) + 10, documents, ()) == 8 * (12 + 14) / 6
    assert simple.bits_each(lambda data: len(data) ** 2, documents, given) == 8 * (81 - 9) / 6


def text(seed: int, words: int = 3000) -> bytes:
    """Of few words, drawn."""
    draw = np.random.default_rng(seed)
    known = [bytes(np.random.default_rng(k).integers(97, 123, 7).astype(np.uint8)) for k in range(200)]
    return b" ".join(known[k] for k in draw.integers(0, 200, words))


@pytest.mark.parametrize("name", ["xz", "bz2", "ppmd"])
def test_compressors_find_what_is_repeated(name: str) -> None:
    if name == "ppmd":
        pytest.importorskip("pyppmd")
    records = {"train": [text(0)], "val": [text(1, 300)], "test": [text(2, 300), text(3, 300)]}
    clock = simple.Clock()
    alone, _ = simple.compress(name, False, records, (2, 4), clock)
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    assert simple.compress(name, False, {**records, "test": [noise]}, (4,), clock)[0]["test/bits"] >= 8
    assert 0.9 < alone["test/bits"] < 6  # a word of 200 in eight bytes is 0.96 bits a byte
    if name != "bz2":  # its blocks forget
        primed, chosen = simple.compress(name, True, records, (2, 4), clock)
        assert primed["test/bits"] < 0.8 * alone["test/bits"]
        assert chosen == ("order 4" if name == "ppmd" else "")


@pytest.mark.parametrize("words", [("linear",), ("boosting",)])
def test_words_of_dna_tell_classes_apart(words: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(0)
    y = {split: draw.integers(0, 2, 60) for split in simple.SPLITS}
    parts = {split: (draw.normal(size=(60, 3)) + 3 * y[split][:, None], y[split]) for split in y}
    monkeypatch.setattr(simple, "features", lambda *_: parts)
    found, chosen = simple.run("genome/binding200", [*words, "kmers"])
    assert found["test/accuracy"] > 0.95
    assert chosen


def test_the_command_says_what_it_found_or_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simple, "run", lambda *given: ({"test/bits": float(given[2])}, str(given)))
    assert simple.main(["text/stdlib_ar", "ppmd", "primed", "--minutes", "3", "--source", "x"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(line.removeprefix(simple.MARK))
    assert found["metrics"] == {"test/bits": 3.0}
    assert found["chosen"] == "('text/stdlib_ar', ['ppmd', 'primed'], 3.0, 'x')"

    def missing(*_: Any) -> Any:
        raise ImportError("no", name="pyppmd")

    monkeypatch.setattr(simple, "run", missing)
    assert simple.main(["text/stdlib_ar", "ppmd"]) == 1
    assert "ppmd needs pyppmd: pip install 'mmlong[floors]'" in capsys.readouterr().err


# The command


def subject() -> Subject:
    return Subject("test/accuracy", (), (("linear", "kmers"),), {name: [name] for name in ("s4d", "gla")}, 3)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One small table; trials and programs that are only noted."""
    noted: list[Any] = []

    def try_one(self: TrialTable, trial: Trial, setting: Any, folder: Path, steps: Any, minutes: Any, *more: Any, say: Callable[[str], None]) -> Row:  # fmt: skip
        key = trial.key(trial.seed, minutes)
        if not self.done(key):
            noted.append((trial, minutes))
            failed = "mmlong fit: no memory" if setting["contender"] == "gla" and trial.seed else ""
            metrics = {} if failed else {"test/accuracy": 0.5 + 0.1 * trial.seed + (setting["kind"] == "mixer") / 4}
            self.add(
                Row(key, dict(setting), trial.seed, metrics, 30, 0.5, 0.25, 1234, 1e9, ["mmlong", *trial.words], failed)
            )
        return self.rows[key]

    def run_logged(words: list[str], log: Path, threads: int) -> str:
        noted.append(words)
        if len(noted) > 20:
            raise TrialFailedError("never")
        return f"noise\n{simple.MARK}{json.dumps({'metrics': {'test/accuracy': 0.875}, 'cpu_minutes': 0.125, 'chosen': 'C 1'})}\n"

    monkeypatch.setattr(TrialTable, "try_one", try_one)
    monkeypatch.setattr(minutes, "run_logged", run_logged)
    monkeypatch.setitem(SUBJECTS, "genome/binding200", subject())
    return noted


def test_rows_are_kept_and_the_table_is_sorted(
    tried: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["genome/binding200", "--minutes", "2", "--seeds", "0", "1", "--runs", str(tmp_path / "r"), "--set", "data.source_path=x", "--markdown", str(tmp_path / "f.md")]  # fmt: skip
    assert minutes.main(words) == 1  # one failed
    trials = [one for one in tried if isinstance(one, tuple)]
    assert len(trials) == 2 * 4
    assert all(given == 2.0 and trial.options["data.source_path"] == "x" for trial, given in trials)
    (program,) = (one for one in tried if isinstance(one, list))
    assert program == ["-m", "mmlong.experiments.minutes.simple", "genome/binding200", "linear", "kmers", "--minutes=2", "--source=x"]  # fmt: skip
    lines = (tmp_path / "f.md").read_text().splitlines()
    assert lines[2] == (
        "| `genome/binding200` | 2 | accuracy | 0.5500 (0.5000 to 0.6000) | 0.8750: linear of kmers | 0.8000 (0.7500 to 0.8500): s4d | 0.5500 (0.5000 to 0.6000) |"
    )
    lines = lines[lines.index("## genome/binding200, 2 CPU minutes") :]
    assert lines[4].startswith("| linear of kmers | simple | 0.8750 | nothing is drawn |  |  | 0.12 |")
    assert lines[5].startswith(
        "| s4d | the same backbone, another mixer | 0.8000 (0.7500 to 0.8500) | 2 | 30 | 0.5 | 0.25 | 1,234 |"
    )
    assert [line.split(" | ")[0] for line in lines[6:9]] == [
        "| the recipe",
        "| other people's layers",
        "| gla",
    ]  # of which a seed failed
    assert (
        "- linear of kmers: `python -m mmlong.experiments.minutes.simple genome/binding200 linear kmers --minutes=2 --source=x`"
        in lines
    )
    assert "- gla, seed 1: mmlong fit: no memory" in lines
    before = len(tried)
    assert minutes.main(words) == 1
    assert len(tried) == before
    assert minutes.main([*words, "--only", "default", "--debug"]) == 0
    assert tried[-1][0].recipes == ("genome/binding200", "genome/binding200.debug")
    with pytest.raises(SystemExit):
        minutes.main(["genome/binding201"])
    assert "did you mean 'genome/binding200'" in capsys.readouterr().err
    before = len(tried)
    assert minutes.main([*words[:1], "--runs", str(tmp_path / "r"), "--seeds", "0"]) == 0  # the minutes of its own
    assert [one[1] for one in tried[before:] if isinstance(one, tuple)] == [3.0] * 4
    capsys.readouterr()
    before = len(tried)
    assert minutes.main(["--show", "--minutes", "2", "--runs", str(tmp_path / "r")]) == 0
    told = capsys.readouterr().out
    assert "## genome/binding200, 2 CPU minutes" in told
    assert "3 CPU minutes" not in told
    assert len(tried) == before
    with pytest.raises(SystemExit):
        minutes.main(["genome/binding200", "--minutes", "0"])


def test_the_table_says_where_one_side_is_tested_on_shorter_rows() -> None:
    def told(recipe: str) -> str:
        setting = {"recipe": recipe, "contender": "other people's layers", "kind": "peers", "minutes": 2.0}
        return minutes.markdown([Row("k", setting, 0, {SUBJECTS[recipe].metric: 2.0}, command=["mmlong"])])

    assert "Other people's layers are tested on rows of at most 8,192 tokens, the rest on rows of 65,536" in told("text/stdlib_ar")  # fmt: skip
    assert "are tested on rows" not in told("genome/chromosome_ar")  # 8,192 for all
    assert "are tested on rows" not in told("genome/binding200")


@pytest.mark.slow
def test_a_debug_size_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, on the recipe's own data."""
    monkeypatch.setenv("MMLONG_DATA", str(tmp_path / "data"))
    words = ["text/stdlib_ar", "--debug", "--minutes", "0.01", "--seeds", "0", "--runs", str(tmp_path / "r"), "--contenders", "the recipe", "attention", "xz"]  # fmt: skip
    assert minutes.main([*words, "--markdown", str(tmp_path / "f.md")]) == 0
    rows = TrialTable.load(tmp_path / "r" / "found.json").rows.values()
    assert {row.setting["contender"] for row in rows} == {"the recipe", "attention", "xz"}
    assert all(0 < row.metrics["test/bits"] < 9 for row in rows)
