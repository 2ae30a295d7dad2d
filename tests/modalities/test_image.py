"""The image modality: exact inverse, grids, positions, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.layout import SCAN_ORDERS
from mmlong.modalities import create_modality, fit_palette


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 17), st.integers(1, 17), st.sampled_from([1, 3]), st.sampled_from(SCAN_ORDERS), st.integers(1, 3))
def test_decode_is_the_exact_inverse(height: int, width: int, channels: int, order: str, batch: int) -> None:
    modality = create_modality("image", 8, size=[height, width], channels=channels, order=order)
    raw = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8)
    tokens, layout = modality.encode(raw)
    assert tokens.shape == (batch, height * width, channels)
    assert tokens.min() >= -1
    assert tokens.max() <= 1
    assert layout.grid == (height, width)
    assert modality.decode(tokens, layout).equal(raw)
    assert modality.embed(tokens, layout).shape == (batch, height * width, 8)
    layout.check(batch, height * width)


def test_every_byte_survives() -> None:
    modality = create_modality("image", 8, size=[16, 16])
    raw = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    tokens, layout = modality.encode(raw)
    assert modality.decode(tokens, layout).equal(raw)


def test_tokens_follow_the_scan_order() -> None:
    modality = create_modality("image", 8, size=[4, 4], order="morton")
    raw = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    tokens, layout = modality.encode(raw)
    seen = ((tokens[0, :, 0] + 1) * 127.5).round().long()
    assert seen.tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    rows_and_columns = layout.coordinates(16)[0]
    assert (rows_and_columns[:, 0] * 4 + rows_and_columns[:, 1]).tolist() == seen.tolist()


def test_position_is_known_to_the_model() -> None:
    modality = create_modality("image", 16, size=[8, 8])
    tokens, layout = modality.encode(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8))
    x = modality.embed(tokens, layout)[0]
    assert torch.cdist(x, x).add(torch.eye(64) * 9).min() > 1e-3, "two equal pixels at different places look the same"


def test_refuses_other_images() -> None:
    modality = create_modality("image", 8, size=[8, 8])
    with pytest.raises(TypeError, match="uint8"):
        modality.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), got \(1, 3, 8, 8\)"):
        modality.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="whole images of 64 pixels, got 63"):
        modality.embed(torch.zeros(1, 63, 1), None)
    with pytest.raises(TypeError, match="did you mean 'order'"):
        create_modality("image", 8, size=[8, 8], odrer="raster")
    with pytest.raises(KeyError, match="did you mean 'image'"):
        create_modality("imgae", 8)
    with pytest.raises(ValueError, match="unknown scan order"):
        create_modality("image", 8, size=[8, 8], order="spiral")


ORDERS = st.sampled_from([*SCAN_ORDERS, "block_raster:3", "random:11"])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 17), st.integers(1, 17), st.sampled_from([1, 3]), ORDERS, st.integers(1, 3))
def test_bytes_are_the_image_itself(height: int, width: int, channels: int, order: str, batch: int) -> None:
    modality = create_modality("image_bytes", 8, size=[height, width], channels=channels, order=order)
    raw = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8)
    tokens, layout = modality.encode(raw)
    assert tokens.shape == (batch, modality.tokens_per_sample())
    assert layout.grid == (height, width, channels)
    assert modality.decode(tokens, layout).equal(raw)
    row, column, channel = layout.coordinates(tokens.shape[1])[0].T
    assert tokens.equal(raw[:, channel, row, column].long()), "the layout says which sub-pixel each token is"


def test_bytes_of_a_pixel_follow_one_another() -> None:
    modality = create_modality("image_bytes", 8, size=[2, 2], channels=3, order="serpentine")
    raw = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert modality.encode(raw)[0].tolist() == [[0, 4, 8, 1, 5, 9, 3, 7, 11, 2, 6, 10]]
    places = modality.places(None, 12)[0]
    assert torch.cdist(places, places).add(torch.eye(12) * 9).min() > 1e-3, "row, column and channel are all told"


def test_a_palette_takes_the_nearest_colour() -> None:
    colours = torch.randint(256, (40, 3))
    modality = create_modality("image_palette", 8, size=[6, 5], palette=colours.tolist(), order="hilbert")
    raw = torch.randint(256, (3, 3, 6, 5), dtype=torch.uint8)
    tokens, layout = modality.encode(raw)
    apart = torch.cdist(raw.movedim(1, -1).reshape(-1, 3).double(), colours.double())
    shown = modality.decode(tokens, layout).movedim(1, -1).reshape(-1, 3).double()
    torch.testing.assert_close((shown - raw.movedim(1, -1).reshape(-1, 3)).norm(dim=1), apart.amin(1))
    assert modality.codes == 40


def test_a_fitted_palette_finds_the_colours_there_are() -> None:
    colours = torch.tensor([[0, 0, 0], [250, 10, 10], [20, 200, 40], [90, 90, 255]])
    draw = torch.Generator().manual_seed(0)
    which = torch.randint(4, (20, 8, 8), generator=draw)
    images = (colours[which] + torch.randint(3, (20, 8, 8, 3), generator=draw)).clamp_max(255).movedim(-1, 1)
    palette = fit_palette(images.to(torch.uint8), 4, seed=3)
    assert torch.cdist(colours + 1.0, palette.float()).amin(1).max() < 2
    assert palette.equal(fit_palette(images.to(torch.uint8), 4, seed=3)), "a function of images and seed"


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 30), st.integers(0, 99), st.sampled_from([1, 3]))
def test_a_palette_has_as_many_colours_as_asked(colours: int, seed: int, channels: int) -> None:
    images = torch.randint(32, (2, channels, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    palette = fit_palette(images, colours, seed)
    assert palette.shape == palette.unique(dim=0).shape == (colours, channels)


def test_k_means_is_no_worse_than_another_implementation() -> None:
    from scipy.cluster.vq import kmeans2

    draw = torch.Generator().manual_seed(1)
    images = (torch.randn(4, 3, 24, 24, generator=draw) * 40 + 128).clamp(0, 255).to(torch.uint8)
    pixels = images.movedim(1, -1).reshape(-1, 3).double()
    theirs, _ = kmeans2(pixels.numpy(), 16, minit="++", seed=0, iter=25)

    def error(centres: torch.Tensor) -> float:
        return float(torch.cdist(pixels, centres.double()).amin(1).square().mean())

    assert error(fit_palette(images, 16)) < 1.05 * error(torch.from_numpy(theirs))


def test_an_empty_palette_says_what_to_do_and_stays_once_it_is_fitted() -> None:
    modality = create_modality("image_palette", 8, size=[8, 8], palette=12)
    raw = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    for call in (lambda: modality.encode(raw), lambda: modality.decode(torch.zeros(1, 64, dtype=torch.int64))):
        with pytest.raises(RuntimeError, match="palette of 12 colours is still empty: call initialise"):
            call()
    with pytest.raises(ValueError, match="as many different ones; these images hold 1"):
        modality.initialise(torch.zeros_like(raw))
    modality.initialise(raw)
    palette = modality.palette.clone()
    modality.initialise(raw.flip(0) // 2)
    assert modality.palette.equal(palette)
    fresh = create_modality("image_palette", 8, size=[8, 8], palette=12)
    fresh.load_state_dict(modality.state_dict())
    assert fresh.encode(raw)[0].equal(modality.encode(raw)[0])


@pytest.mark.parametrize(
    ("palette", "says"),
    [
        ([[0, 0, 0]], "at least 2 colours, got 1"),
        ([[0], [1]], "3 whole numbers in 0..255"),
        ([[0, 0, 256]] * 2, "0..255"),
        (1, "got 1"),
    ],
)
def test_a_palette_that_is_none(palette: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_modality("image_palette", 8, size=[8, 8], palette=palette)


def test_palettes_are_fitted_to_images() -> None:
    with pytest.raises(TypeError, match="uint8 images"):
        fit_palette(torch.rand(1, 3, 8, 8), 4)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(3, 8, 8\)"):
        fit_palette(torch.zeros(3, 8, 8, dtype=torch.uint8), 4)


@pytest.mark.parametrize("name", ["image", "image_bytes"])
def test_without_bands_nobody_is_told_where_a_pixel_is(name: str) -> None:
    modality = create_modality(name, 8, size=[4, 5], channels=3, bands=0)
    raw = torch.full((2, 3, 4, 5), 7, dtype=torch.uint8)
    tokens, layout = modality.encode(raw)
    x = modality.embed(tokens, layout)
    pixels = x.unflatten(1, (20, -1))
    torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels))
    assert not any("place" in key for key in modality.state_dict())
    with pytest.raises(ValueError, match="bands.*at least 0, got -1"):
        create_modality(name, 8, size=[4, 5], bands=-1)
