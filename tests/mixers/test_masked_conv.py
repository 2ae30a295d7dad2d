"""The masked convolutions against torch's conv2d and conv3d with masked kernels."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmlong.layout import Layout
from mmlong.mixers import create_mixer


def by_conv2d(mixer: torch.nn.Module, x: torch.Tensor, height: int) -> torch.Tensor:
    radius, width, dim = mixer.radius, mixer.width, x.shape[-1]
    kernel = torch.zeros(dim, dim, 2 * radius + 1, 2 * radius + 1, dtype=x.dtype)
    for tap, (dr, dc) in enumerate(mixer.taps):
        kernel[:, :, radius - dr, radius + dc] = mixer.weight[tap].T
    image = x.transpose(1, 2).unflatten(2, (height, width))
    return F.conv2d(image, kernel, mixer.bias, padding=radius).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("height", "width", "radius"), [(1, 5, 2), (7, 9, 1), (6, 11, 3)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.oracle("torch: conv2d with a masked kernel", "masked_conv2d")
def test_it_is_the_masked_convolution(held: Any, height: int, width: int, radius: int, batch: int) -> None:
    torch.manual_seed(0)
    mixer = create_mixer("masked_conv2d", 6, width=width, radius=radius).double()
    torch.nn.init.normal_(mixer.bias)
    x = torch.randn(batch, height * width, 6, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x)
    wanted = by_conv2d(mixer, x, height)
    tail = F.pad(x, (0, 0, mixer.reach, 0))[:, -mixer.reach :]
    held(x, (y, state), (wanted, (tail, torch.full((batch,), height * width))))
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * weight).sum(), x)
    (expected,) = torch.autograd.grad((wanted * weight).sum(), x)
    torch.testing.assert_close(found, expected)


def by_conv3d(mixer: torch.nn.Module, x: torch.Tensor, frames: int) -> torch.Tensor:
    back, radius, dim = mixer.frames, mixer.radius, x.shape[-1]
    kernel = torch.zeros(dim, dim, back + 1, 2 * radius + 1, 2 * radius + 1, dtype=x.dtype)
    for tap, (dt, dr, dc) in enumerate(mixer.taps):
        kernel[:, :, back - dt, radius - dr, radius + dc] = mixer.weight[tap].T
    video = x.transpose(1, 2).unflatten(2, (frames, mixer.height, mixer.width))
    y = F.conv3d(F.pad(video, (radius, radius, radius, radius, back, 0)), kernel, mixer.bias)
    return y.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("frames", "size", "back", "radius"), [(1, (3, 4), 1, 1), (4, (3, 5), 2, 1), (3, (5, 7), 1, 2), (5, (3, 3), 3, 1)]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.oracle("torch: conv3d with a masked kernel", "masked_conv3d")
def test_it_is_the_masked_convolution_of_a_video(
    held: Any, frames: int, size: tuple[int, int], back: int, radius: int, batch: int
) -> None:
    torch.manual_seed(0)
    height, width = size
    mixer = create_mixer("masked_conv3d", 6, height=height, width=width, frames=back, radius=radius).double()
    torch.nn.init.normal_(mixer.bias)
    assert len(mixer.taps) == back * (2 * radius + 1) ** 2 + 2 * radius * (radius + 1) + 1
    length = frames * height * width
    x = torch.randn(batch, length, 6, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x)
    wanted = by_conv3d(mixer, x, frames)
    tail = F.pad(x, (0, 0, mixer.reach, 0))[:, -mixer.reach :]
    held(x, (y, state), (wanted, (tail, torch.full((batch,), length))))
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * weight).sum(), x)
    (expected,) = torch.autograd.grad((wanted * weight).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "options"), [("masked_conv2d", {"width": 5}), ("masked_conv3d", {"height": 3, "width": 3})]
)
def test_documents_begin_a_raster_of_their_own(name: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    mixer = create_mixer(name, 4, **options).double()
    a, b = torch.randn(1, 13, 4, dtype=torch.float64), torch.randn(1, 17, 4, dtype=torch.float64)
    resets = torch.zeros(1, 30, dtype=torch.bool)
    resets[0, 13] = True
    y, state = mixer(torch.cat([a, b], 1), None, Layout(resets=resets))
    torch.testing.assert_close(y, torch.cat([mixer(a)[0], mixer(b)[0]], 1))
    torch.testing.assert_close(state, mixer(b)[1], msg="the state has nothing of the document before")


@pytest.mark.parametrize(
    ("name", "options"), [("masked_conv2d", {"width": 5}), ("masked_conv3d", {"height": 3, "width": 4, "frames": 2})]
)
@pytest.mark.parametrize("relu", [False, True])
def test_whole_rasters_are_what_pieces_of_any_length_make(name: str, options: dict[str, int], relu: bool) -> None:
    """Whole, it is one convolution, in pieces one tap after another."""
    torch.manual_seed(0)
    mixer = create_mixer(name, 4, relu=relu, **options).double()
    torch.nn.init.normal_(mixer.bias)
    x = torch.randn(3, 63, 4, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x)
    torch.testing.assert_close(y, without_relu(mixer)(x.relu() if relu else x)[0])
    parts, last = [], None
    for piece in x.split([1, 1, 7, 40, 14], 1):
        part, last = mixer(piece, last)
        parts.append(part)
    z = torch.cat(parts, 1)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(state, last)
    weight = torch.randn_like(y)
    for wanted in (x, mixer.weight):
        torch.testing.assert_close(*(torch.autograd.grad((each * weight).sum(), wanted, retain_graph=True) for each in (y, z)))  # fmt: skip
    layout = Layout(lengths=torch.tensor([63, 0, 31]))
    padded, left = mixer(x, None, layout)
    torch.testing.assert_close(padded[2, :31], y[2, :31])
    torch.testing.assert_close(tuple(t[2:] for t in left), mixer(x[2:, :31])[1])
    assert left[1].tolist() == [63, 0, 31]


def without_relu(mixer: Any) -> Any:
    plain = copy.deepcopy(mixer)
    plain.relu = False
    return plain


@pytest.mark.parametrize(("height", "width", "radius"), [(7, 9, 1), (6, 11, 3)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.oracle("torch: conv2d", "masked_conv2d")
def test_of_both_sides_it_is_a_convolution(held: Any, height: int, width: int, radius: int, batch: int) -> None:
    torch.manual_seed(0)
    mixer = create_mixer("masked_conv2d", 6, causal=False, width=width, radius=radius).double()
    torch.nn.init.normal_(mixer.bias)
    square = torch.nn.Conv2d(6, 6, 2 * radius + 1, padding=radius).double()
    with torch.no_grad():
        # A tap says how far back a row lies and how far on a column.
        square.weight.copy_(mixer.weight.unflatten(0, (2 * radius + 1, -1)).flip(0).permute(3, 2, 0, 1))
        square.bias.copy_(mixer.bias)
    x = torch.randn(batch, height * width, 6, dtype=torch.float64, requires_grad=True)
    wanted = square(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)
    y, state = mixer(x)
    held(x, (y, None), (wanted, None))
    torch.testing.assert_close(y, wanted)
    assert state is None


@pytest.mark.parametrize(
    ("name", "options"), [("masked_conv2d", {"width": 5}), ("masked_conv3d", {"height": 3, "width": 4, "frames": 2})]
)
def test_of_both_sides_documents_and_padding_stay_apart(name: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    mixer = create_mixer(name, 4, causal=False, **options).double()
    x = torch.randn(2, 63, 4, dtype=torch.float64)
    resets = torch.zeros(2, 63, dtype=torch.bool)
    resets[0, 20] = resets[1, 0] = resets[1, 31] = True
    lengths = torch.tensor([50, 57])
    far = x.clone()
    far[0, 50:], far[1, 57:] = 1e6, torch.nan
    y, _ = mixer(far, None, Layout(lengths=lengths, resets=resets))
    for row, bounds in ((0, [0, 20, 50]), (1, [0, 31, 57])):
        for i, j in itertools.pairwise(bounds):
            torch.testing.assert_close(y[row : row + 1, i:j], mixer(x[row : row + 1, i:j])[0])
    z, _ = mixer(far, None, Layout(lengths=lengths))
    torch.testing.assert_close(z[:1, :50], mixer(x[:1, :50])[0])
    torch.testing.assert_close(z[1:, :57], mixer(x[1:, :57])[0])


def test_a_row_must_be_wider_than_the_neighbourhood() -> None:
    with pytest.raises(ValueError, match="width > 2"):
        create_mixer("masked_conv2d", 4, width=4, radius=2)


@pytest.mark.parametrize("options", [{"height": 2}, {"width": 4, "radius": 2}, {"frames": 0}])
def test_a_frame_must_be_larger_than_the_neighbourhood(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="frames >= 1, radius >= 1 and height and width > 2"):
        create_mixer("masked_conv3d", 4, **options)
