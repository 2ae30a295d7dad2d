"""``mmlong bench`` for speed: the command line, and the experiment that holds the promises. Jobs only pretend to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmlong.experiments.speed import __main__ as speed

from mmlong.bench.peers import PEERS
from mmlong.bench.report import Report
from mmlong.bench.table import PRESETS
from mmlong.cli import bench_speed
from mmlong.cli.bench import run_bench
from mmlong.cli.errors import CommandError

INSTALLED = all(PEERS[name].installed for name in PEERS.names())


@pytest.fixture
def jobs(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command asks for, answered at once."""
    monkeypatch.setattr(bench_speed, "run_job", pretend)
    return pretend


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.skipif(not PEERS["longformer"].installed, reason="needs transformers")
def test_mixers_beside_peers(jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.seconds = lambda job: (1.0 if job["subject"]["side"] == "ours" else 4.0) * job["length"] / 64
    out = [f"--json={tmp_path / 'r.json'}", f"--plot={tmp_path / 'p.png'}"]
    ask = words(
        "mixers mamba2 hyen* --against mamba2-transformers --lengths 64,128 --dim 8 --dtype fp32,bf16 --rounds 1 --max-memory 2"
    )
    assert run_bench([*ask, "--option", "mamba2.chunk=16", *out]) == 0
    said = capsys.readouterr().out
    assert (
        "mamba2 (chunk=16), ours, fp32, both: time grows as length^1.00, memory as length^0.00, from 64 to 128" in said
    )
    rows = [line.split() for line in said.splitlines() if " both  " in line and "mamba2-transformers" in line]
    assert [row[-1] for row in rows] == ["4.00"] * 4
    assert [job["kind"] for job in jobs.jobs].count("machine") == 2
    assert (jobs.jobs[0]["kind"], jobs.jobs[-1]["kind"]) == ("machine", "machine")  # before and after all else
    assert {job["max_memory"] for job in jobs.jobs} == {2_000_000_000}
    report = Report.load(tmp_path / "r.json")
    assert {(r.name, r.side) for r in report.rows} == {
        ("mamba2 (chunk=16)", "ours"), ("mamba2 (chunk=16)", "mamba2-transformers"), ("hyena", "ours"),
    }  # fmt: skip
    assert report.machine["peaks"] == {"gemm_fp32": 1e11, "gemm_bf16": 1e11, "copy": 2e10}
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert run_bench(["show", str(tmp_path / "r.json"), f"--plot={tmp_path / 'q.png'}"]) == 0
    assert "length^1.00" in capsys.readouterr().out
    assert (tmp_path / "q.png").exists()


def test_blocks_directions_and_modes(jobs: Any) -> None:
    assert (
        run_bench(
            words(
                "blocks s4d --lengths 9 --dim 8 --batch 3 --mode forward,both --direction both --ffn mlp --peak-seconds 0"
            )
        )
        == 0
    )
    assert [(j["mode"], j["batch"], j["count"]) for j in jobs.jobs] == [
        (mode, 3, first) for mode in ("forward", "both") for first in (True, False)
    ]
    assert {(j["subject"]["ffn"], j["subject"]["direction"]) for j in jobs.jobs} == {("mlp", "both")}


def test_models_of_a_recipe_and_without(jobs: Any) -> None:
    assert (
        run_bench(
            words(
                "models -c image/mnist784 --model.backbone.depth 1 --trainer.gradient_clip_val 0.5 --rounds 1 --dtype fp32"
            )
        )
        == 0
    )
    (job,) = (j for j in jobs.jobs if j["kind"] == "model")
    assert job["task"]["init_args"]["backbone"]["depth"] == 1
    assert job["task"]["init_args"]["data_info"]["num_classes"] == 10
    assert job["trainer"]["gradient_clip_val"] == 0.5
    assert job["shape"] == {"batch": 32, "length": None, "streamed": False}
    assert run_bench(words("models --dim 8 --length 77 --batch 2 --rounds 1 --dtype bf16")) == 0
    assert jobs.jobs[-2]["shape"] == {"batch": 2, "length": 77, "streamed": True}


def test_streams(jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = words("stream mamba2 --tokens 30 --window 10 --dim 8 --depth 2 --compile --peak-seconds 0")
    assert run_bench([*ask, f"--json={tmp_path / 'r.json'}", f"--plot={tmp_path / 'p.png'}"]) == 0
    assert [job["compile"] for job in jobs.jobs] == [False, True]
    assert "mamba2, compiled" in capsys.readouterr().out
    assert [s["compiled"] for s in Report.load(tmp_path / "r.json").streams] == [False, True]


@pytest.mark.skipif(not INSTALLED, reason="needs every peer")
@pytest.mark.parametrize(
    ("which", "fails", "told"),
    [
        ("", "s5", "s4d, s5"),
        ("state", "xlstm", "mlstm, xlstm"),
        ("softmax", "fnet", "fnet (norm=backward, both), fnet"),
    ],
)
def test_a_table_in_one_command(
    jobs: Any, capsys: pytest.CaptureFixture[str], which: str, fails: str, told: str
) -> None:
    jobs.failed = lambda job: (
        "exit status 1\nboom" if job["kind"] == "layer" and job["subject"]["peer"] == fails else None
    )
    assert run_bench(words(f"table {which} --lengths 64,128 --dim 8 --peers-to 64 --rounds 1")) == 0
    peers = {
        (j["subject"]["peer"], j["length"])
        for j in jobs.jobs
        if j["kind"] == "layer" and j["subject"]["side"] == "theirs"
    }
    aims = PRESETS[which or "first"].aims
    assert peers == {(aim.peer, 64) for aim in aims if aim.peer is not None}
    assert {j["subject"]["mixer"] for j in jobs.jobs if j["kind"] == "layer"} == {aim.mixer for aim in aims}
    assert any(j["kind"] == "model" for j in jobs.jobs) == (not which)
    said = capsys.readouterr().out
    assert "growth from 64 to 128" in said
    assert f"failed: {told}, 64 tokens, fp32, both: exit status 1\nboom" in said


def test_every_peer_stands_in_a_table() -> None:
    assert {aim.peer for table in PRESETS.values() for aim in table.aims} - {None} == set(PEERS.names())


def test_where_nothing_could_be_measured(jobs: Any, tmp_path: Path) -> None:
    jobs.failed = lambda job: "killed by SIGKILL"
    assert run_bench([*words("mixers s4d --lengths 9 --dim 8"), f"--plot={tmp_path / 'p.png'}"]) == 1
    assert not (tmp_path / "p.png").exists()


def test_interrupted_shows_what_there_is(jobs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(job: Any) -> float:
        if job["length"] > 9:
            raise KeyboardInterrupt
        return 1.0

    jobs.seconds = stop
    assert run_bench(words("mixers s4d --lengths 9,10 --dim 8")) == 130
    assert "s4d" in capsys.readouterr().out


def test_peers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(["peers"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in PEERS.names())


def test_wrong_commands(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "r.json").write_text("{}")
    for wrong, message in (
        ("mixers hiena", "no mixer 'hiena' .did you mean 'hyena'"),
        ("mixers mamba2 --against longfomer", "no peer 'longfomer' .did you mean 'longformer'"),
        ("mixers mamba2 --against longformer", "peer longformer stands against local, which is not measured"),
        ("mixers hyena --against all", "no peer stands against hyena"),
        ("mixers local --against longformer --direction causal", "peer longformer sees both only"),
        ("mixers s4d --option d_stat=4", "has no option 'd_stat' .did you mean 'd_state'"),
        ("mixers s4d --option d_state=3", "d_state must be even"),
        ("mixers s4d --option mamba2.chunk=3", "mixer 'mamba2' is not measured"),
        ("mixers s4d --option chunk", "write KEY=VALUE"),
        ("mixers s4d --device cuda", "torch sees no CUDA device here"),
        ("mixers s4d --max-memory 0", "give a positive number"),
        ("mixers s4d --timeout -1", "give a positive number"),
        ("mixers s4d --threads -1", "a number of threads, or 0"),
        (f"mixers s4d --json {tmp_path}", "is a folder; give a file"),
        ("models -c text/newz", "no recipe 'text/newz'"),
        ("models -c genome/binding200", "as long as its documents: how long. --length N"),
        ("models --model.backbone.depth 3", "--model.backbone.depth is a key of a recipe"),
        ("stream --option window=3 mamba2", "has no option 'window'"),
        (f"show {tmp_path / 'none.json'}", "cannot be read"),
        (f"show {tmp_path / 'r.json'}", "holds no report of mmlong bench"),
    ):
        with pytest.raises(CommandError, match=message):
            run_bench(words(wrong))
    assert jobs.jobs == []


def test_wrong_values_are_told_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        ("mixers s4d --lengths 0", "a length of 0: lengths are at least 1"),
        ("mixers s4d --lengths 16k", "is no list of whole numbers"),
        ("mixers s4d --dtype fp23", "'fp23' (did you mean 'fp32'?)"),
        ("mixers s4d --rounds 0", "is no whole number of at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_bench(words(wrong))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_a_missing_package_is_named(jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        CommandError, match="pip install local-attention transformers, or all peers: pip install 'mmlong.bench.'"
    ):
        run_bench(words("mixers local --against all"))


@pytest.mark.skipif(not PEERS["mamba2-transformers"].installed, reason="needs transformers")
def test_the_experiment_holds_what_is_promised(
    pretend: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed.contest, "__defaults__", (pretend,))
    faster = 5.0
    pretend.seconds = lambda job: 1.0 if job["subject"]["side"] == "ours" else faster
    # 3 GB are held at most; 2 GiB are promised of mamba2, 3 GiB of local.
    assert speed.main(["local", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["ratio"], found["promised_ratio"], found["holds"]) == (5.0, 6.0, False)
    faster = 6.5
    assert speed.main(["local"]) == 0
    assert speed.main(["mamba2"]) == 1
    assert speed.main(["mamba2", "--length", "100"]) == 0  # nothing is promised of another size
    pretend.failed = lambda job: "killed by SIGKILL" if job["kind"] == "layer" else None
    with pytest.raises(SystemExit, match="mamba2, ours: killed by SIGKILL"):
        speed.main(["mamba2"])
