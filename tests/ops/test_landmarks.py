"""Segments and the iterated pseudo-inverse by themselves; the attention made of them is held against other people's in tests/mixers/test_nystromformer.py."""

from __future__ import annotations

import torch

from mmlong.ops.landmarks import iterated_inverse, nystrom_attention, segment_means


def test_the_iteration_ends_in_the_inverse() -> None:
    torch.manual_seed(0)
    A = (3 * torch.eye(9, dtype=torch.float64) + torch.randn(2, 3, 9, 9, dtype=torch.float64)).softmax(-1)
    torch.testing.assert_close(iterated_inverse(A, 40), torch.linalg.inv(A), rtol=1e-6, atol=1e-6)
    off = [(iterated_inverse(A, n) @ A - torch.eye(9)).abs().amax() for n in (4, 6, 8)]
    assert off[0] > off[1] > off[2]


def test_matrices_do_not_see_one_another() -> None:
    torch.manual_seed(0)
    A = torch.randn(2, 3, 9, 9, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(iterated_inverse(A, 6)[1, 2], iterated_inverse(A[1, 2], 6))


def test_segments_are_as_even_as_can_be() -> None:
    x = torch.arange(11.0).view(1, 11, 1)
    assert segment_means(x, 3).flatten().tolist() == [1.5, 5.5, 9.0]
    assert segment_means(x, 11).flatten().tolist() == x.flatten().tolist()
    assert segment_means(x, 1).flatten().tolist() == [5.0]


def test_tokens_alike_within_segments_have_attention_itself() -> None:
    """There the landmarks are all the tokens that there are."""
    torch.manual_seed(0)
    marks, kmarks, values = (torch.randn(2, 3, 6, 8, dtype=torch.float64) for _ in range(3))
    q, k, v = (t.repeat_interleave(5, 2) for t in (marks, kmarks, values))
    exact = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(nystrom_attention(q, k, v, marks, kmarks, 60), exact, rtol=1e-4, atol=1e-4)
