"""The counters behind the declared cost count what they say."""

from __future__ import annotations

import pytest
import torch

from mmlong.testing.cost import _Kept, _Meter


def test_memory_that_was_freed_is_not_counted_as_alive() -> None:
    with _Meter() as meter:
        for _ in range(20):
            t = torch.ones(1000)
            del t
    assert meter.live.peak == 4000
    with _Meter() as meter:
        kept = [torch.ones(1000) for _ in range(20)]
    assert meter.live.peak == 4000 * len(kept)


def test_what_a_graph_keeps_is_alive_until_its_backward() -> None:
    x = torch.randn(1000, requires_grad=True)

    def sines() -> torch.Tensor:
        y = x
        for _ in range(20):
            y = y.sin()
        return y

    with _Meter() as meter:
        y = sines()
    assert meter.live.peak == 20 * 4000
    with torch.no_grad(), _Meter() as meter:
        y = sines()
    assert meter.live.peak == 2 * 4000
    assert y.shape == x.shape


def test_views_write_nothing_and_in_place_operations_do() -> None:
    x = torch.ones(10, 10)
    with _Meter() as meter:
        view = x.t()[2:].unflatten(1, (2, 5))[0]
        assert (meter.written, meter.live.peak) == (0, 0)
        x.add_(1)
        view.mul_(2)
        assert (meter.written, meter.live.peak) == (100 + 10, 0)
        copy = view.contiguous()
        assert (meter.written, meter.live.peak) == (120, 40)
    assert copy.shape == (2, 5)


@pytest.mark.parametrize("shared", [True, False])
def test_each_saved_storage_counts_once_and_parameters_do_not(shared: bool) -> None:
    layer = torch.nn.Linear(10, 10)
    kept = _Kept(layer)
    x = torch.randn(5, 10)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        y = layer(x)
        y = y + layer(x if shared else x.clone())
    assert y.requires_grad
    assert kept.bytes == 4 * 50 * (1 if shared else 2)
