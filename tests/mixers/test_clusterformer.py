"""Cluster-Former's layer against its definition, chunk by chunk; how its centroids move is in test_routing.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlong.mixers import create_mixer


@pytest.mark.parametrize("length", [2, 6, 7, 50])
@pytest.mark.oracle("definition: chunk by chunk", "clusterformer")
def test_against_the_definition(same_as: Any, length: int) -> None:
    torch.manual_seed(0)
    m: Any = create_mixer("clusterformer", 24, heads=3, clusters=4, chunk=6).double().eval()
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    outputs = []
    for row in x:
        unit = row / row.norm(dim=-1, keepdim=True)
        cluster = (unit @ m.centroids.means[0].T).argmax(-1).tolist()
        line = sorted(range(length), key=lambda i: (cluster[i], i))
        y: list[Any] = [None] * length
        for a in range(0, length, 6):
            chunk = line[a : a + 6]
            q, k, v = (p(row[chunk]).unflatten(-1, (3, 8)).transpose(0, 1) for p in (m.q_proj, m.k_proj, m.v_proj))
            found = (q @ k.mT / 8**0.5).softmax(-1) @ v
            for i, t in zip(chunk, m.out_proj(found.transpose(0, 1).flatten(1)), strict=True):
                y[i] = t
        outputs.append(torch.stack(y))
    same_as(m, x, m(x), (torch.stack(outputs), None))


def test_centroids_follow_hidden_states_in_training() -> None:
    m: Any = create_mixer("clusterformer", 8, heads=1, clusters=1)
    x = torch.randn(1, 50, 8)
    m.train()(x)
    at_first = m.centroids.means.clone()
    with torch.no_grad():
        m.q_proj.weight.mul_(1.1)
    m(x)
    mean = torch.nn.functional.normalize(x[0], dim=-1).mean(0)
    moved = torch.nn.functional.normalize(0.999 * at_first[0, 0] + 0.001 * mean, dim=0)
    torch.testing.assert_close(m.centroids.means[0, 0], moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "no causal form"),
        ({"clusters": 0}, "clusters must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ClusterFormer.*{message}"):
        create_mixer("clusterformer", 24, **options)
