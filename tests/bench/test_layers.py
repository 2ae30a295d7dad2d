"""One layer: what is measured of it, and that the counted work is the formula's."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import pytest
import torch

from mmlong.bench import hierarchy_peers, low_rank_peers, peers, sparse_peers, state_peers
from mmlong.bench import peer as peer_module
from mmlong.bench.contest import Subject
from mmlong.bench.layers import build, compare, measure, out_of_memory
from mmlong.bench.peers import PEERS, MissingPackageError, Peer, peers_of, require
from mmlong.mixers import MIXERS, list_mixers


def job(subject: Subject, **fields: Any) -> dict[str, Any]:
    return {
        "subject": asdict(subject), "dim": 16, "batch": 1, "length": 64, "dtype": "fp32", "mode": "both", "repeats": 2,
        "count": True, "device": "cpu", **fields,
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", ["forward", "both"])
def test_counted_work_of_attention_is_the_formula(batch: int, mode: str) -> None:
    D, L = 16, 65
    found = measure(job(Subject("attention", direction="both"), batch=batch, length=L, mode=mode))
    # Four projections, scores and weighted sum of every pair; a multiplication and an addition are two.
    forward = batch * (4 * 2 * L * D * D + 2 * 2 * L * L * D)
    assert found["flops"]["useful"] == (forward if mode == "forward" else 3 * forward)
    if mode == "forward":
        assert found["flops"]["done"] == forward
    else:
        assert found["flops"]["done"] >= 3 * forward  # the backward of attention computes the scores again
    assert len(found["times"]) == 2
    for time in found["times"]:
        assert 0 < time["forward"] <= time["all"]
    assert found["peak"] >= found["baseline"] > 0


def test_counted_work_of_a_block_is_mixer_and_feed_forward() -> None:
    alone, block = (measure(job(Subject("s4d", ffn=ffn)))["flops"]["useful"] for ffn in (None, "mlp"))
    module, _ = build(asdict(Subject("s4d", ffn="mlp")), 16)
    weights = sum(p.numel() for name, p in module.named_parameters() if name.startswith("ffn") and p.ndim == 2)
    assert block - alone == 3 * 2 * 64 * weights


@pytest.mark.parametrize("mixer", ["mamba2", "s4d", "local"])
def test_counted_work_of_a_linear_mixer_grows_by_the_same_with_each_piece(mixer: str) -> None:
    # Inside hand-written autograd functions too: none of it is missed at some lengths only.
    subject = Subject(mixer, {"window": 16} if mixer == "local" else {})
    counts = [measure(job(subject, length=n * 1024, repeats=1))["flops"] for n in (1, 2, 3)]
    for what in ("done", "useful"):
        first, second = (b[what] - a[what] for a, b in itertools.pairwise(counts))
        assert first == pytest.approx(second, rel=0.1)  # chunks do not come out even
        assert first > 0.3 * counts[0][what]
    assert all(count["done"] > 0.8 * count["useful"] for count in counts)


def test_every_registered_mixer_can_be_measured_in_both_formats() -> None:
    for mixer in list_mixers():
        for dtype in ("fp32", "bf16"):
            found = measure(job(Subject(mixer), length=17, dtype=dtype, repeats=1))
            assert found["flops"]["useful"] > 0, (mixer, dtype)
        if not MIXERS[mixer].traits.bidirectional:
            assert type(build(asdict(Subject(mixer, direction="both")), 16)[0]).__name__ == "BothWays"


SMALL: dict[str, dict[str, Any]] = {
    "linformer": {"max_length": 64, "rank": 8},
    "bigbird": {"block": 2},
    "local": {"window": 8},
    "longformer": {"window": 8},
    "nystromformer": {"landmarks": 8},
}

LENGTHS = {"nystromformer": 40}
"""Tokens at which two sides are the same, where that is not any length."""


@pytest.mark.parametrize("name", [name for name in PEERS.names() if PEERS[name].same])
def test_both_sides_of_a_peer_are_the_same_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = PEERS[name]
    pytest.importorskip(peer.module)
    asked = job(Subject(peer.mixer, SMALL.get(peer.mixer, {}), peer=name), length=LENGTHS.get(name, 37))
    assert compare(asked)["difference"] < 1e-5
    if not list(peer.pair(16, SMALL.get(peer.mixer, {})).theirs.parameters()):
        return  # nothing to copy
    for module in (peer_module, hierarchy_peers, low_rank_peers, peers, sparse_peers, state_peers):
        monkeypatch.setattr(module, "copy_weights", lambda pairs: None)
    assert not compare(asked)["difference"] <= peer.tolerance  # not a number is no agreement either


@pytest.mark.parametrize("name", PEERS.names())
def test_both_sides_of_a_peer_run(name: str) -> None:
    peer = PEERS[name]
    pytest.importorskip(peer.module)
    for side in ("ours", "theirs"):
        subject = Subject(peer.mixer, SMALL.get(peer.mixer, {}), peer=name, side=side)
        assert measure(job(subject, length=33, repeats=1))["flops"]["useful"] > 0
        _, run = build(asdict(subject), 16)
        assert run(torch.randn(3, 19, 16)).shape == (3, 19, 16)


def test_peers_are_found_by_mixer() -> None:
    assert peers_of("local") == ["local-attention", "longformer"]
    assert peers_of("hyena") == []
    with pytest.raises(KeyError, match="unknown peer 'longfomer' .did you mean 'longformer'"):
        PEERS["longfomer"]


def test_a_missing_package_is_named_with_the_command_that_gets_it() -> None:
    missing = Peer("s4d", "some-package", "no_such_module_here", "S", lambda dim, options: None, {})  # type: ignore[arg-type, return-value]
    for refused in (lambda: require([PEERS["longformer"], missing]), lambda: missing.pair(8, {})):
        with pytest.raises(MissingPackageError, match="some-package: not installed. pip install some-package"):
            refused()


def test_what_says_that_there_is_no_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not fit"))
