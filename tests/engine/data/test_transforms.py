import numpy as np
import pytest
from PIL import Image

from carillon.engine.data.order import position_generator
from carillon.engine.data.transforms import (
    ImageAugmentConfig,
    eval_transform,
    needed_side,
    train_transform,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


def generator(position: int = 0) -> np.random.Generator:
    return position_generator(1, "sample", position)


def test_the_evaluation_crop_is_the_centred_square() -> None:
    expected = Image.fromarray(PICTURE[:, 16:64]).resize((32, 32), Image.Resampling.BICUBIC)
    difference = eval_transform(PICTURE, 32).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 3  # an intermediate row is rounded otherwise
    assert np.abs(difference).mean() < 0.1
    square = PICTURE[:, :48]
    assert np.array_equal(eval_transform(square, 48), square)


def test_a_reduction_averages_what_it_cannot_show() -> None:
    """A checkerboard of single pixels becomes grey; taking samples would leave black or white."""
    board = np.indices((96, 96)).sum(axis=0)[..., None].repeat(3, axis=2) % 2 * 255
    inside = eval_transform(board.astype(np.uint8), 20)[2:-2, 2:-2]
    assert np.abs(inside.astype(int) - 127.5).max() < 10


def test_augmentation_is_a_function_of_the_generator() -> None:
    config = ImageAugmentConfig(min_scale=0.3, color_jitter=0.4, flip=True)
    one = train_transform(PICTURE, 24, config, generator(5))
    assert np.array_equal(one, train_transform(PICTURE, 24, config, generator(5)))
    assert not np.array_equal(one, train_transform(PICTURE, 24, config, generator(6)))


def test_crops_stay_inside_and_keep_the_stated_share() -> None:
    """A picture whose red is x and green is y: the crop's corners tell the box that was taken."""
    y, x = np.mgrid[0:200, 0:200]
    picture = np.stack([x, y, 0 * x], axis=2).astype(np.uint8)
    config = ImageAugmentConfig(min_scale=0.5)
    areas = []
    for position in range(200):
        out = train_transform(picture, 50, config, generator(position)).astype(float)
        width = out[:, -1, 0].mean() - out[:, 0, 0].mean()
        height = out[-1, :, 1].mean() - out[0, :, 1].mean()
        areas.append(width * height * (50 / 49) ** 2 / 200**2)  # from pixel centres to edges
    assert min(areas) > 0.47  # 0.5 less resampling at the borders
    assert max(areas) < 1.02
    assert 0.68 < np.mean(areas) < 0.80  # uniform on [0.5, 1], less what did not fit


@pytest.mark.parametrize("shape", [(1, 1), (1, 600), (60_000, 1), (1, 60_000), (2, 3)])
def test_extreme_shapes_are_cropped(shape: tuple[int, int]) -> None:
    picture = np.full((*shape, 3), 7, dtype=np.uint8)
    out = train_transform(picture, 16, ImageAugmentConfig(color_jitter=0.0), generator())
    assert np.array_equal(out, np.full((16, 16, 3), 7))
    assert np.array_equal(eval_transform(picture, 16), np.full((16, 16, 3), 7))


def test_flips_mirror_half_of_the_pictures_and_only_when_asked() -> None:
    plain = ImageAugmentConfig(randcrop=False)
    straight = train_transform(PICTURE, 32, plain, generator())
    assert np.array_equal(straight, eval_transform(PICTURE, 32))
    flipping = ImageAugmentConfig(randcrop=False, flip=True)
    outs = [train_transform(PICTURE, 32, flipping, generator(p)) for p in range(200)]
    mirrored = [np.array_equal(out, straight[:, ::-1]) for out in outs]
    kept = [np.array_equal(out, straight) for out in outs]
    assert sum(mirrored) + sum(kept) == 200
    assert 70 < sum(mirrored) < 130  # 4 deviations of a fair coin


def test_jitter_moves_brightness_contrast_and_saturation() -> None:
    config = ImageAugmentConfig(randcrop=False, color_jitter=0.5)
    grey = np.full((8, 8, 3), 100, dtype=np.uint8)
    levels = []
    for position in range(100):
        out = train_transform(grey, 8, config, generator(position))
        assert np.ptp(out.astype(int)) <= 1  # grey has no colour or contrast to change
        levels.append(int(out[0, 0, 0]))
    assert min(levels) < 60
    assert max(levels) > 140
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 200
    outs = [train_transform(red, 8, config, generator(position)) for position in range(50)]
    assert max(int(out[0, 0, 1]) for out in outs) > 15  # some lose saturation


def test_zooming_out_keeps_the_whole_picture_on_a_border_of_its_corners_colour() -> None:
    picture = np.full((40, 40, 3), (10, 200, 30), dtype=np.uint8)
    picture[8:32, 8:32] = (250, 0, 0)
    config = ImageAugmentConfig(min_scale=4.0, max_scale=4.0, max_aspect=1.0)
    corners = set()
    for position in range(20):
        out = train_transform(picture, 40, config, generator(position)).astype(int)
        red = np.argwhere((out[..., 0] > 200) & (out[..., 1] < 50))
        assert 10 * 10 <= len(red) <= 13 * 13  # 24 x 24 at half size, softened at the edges
        corners.add(tuple(red.min(axis=0)))
        assert np.all(out[0, 0] == (10, 200, 30))
        assert np.all(out[-1, -1] == (10, 200, 30))
    assert len(corners) > 10  # anywhere on the border


def test_the_side_that_a_crop_needs() -> None:
    assert needed_side(64, ImageAugmentConfig(min_scale=0.25, max_aspect=1.0)) == 128
    assert needed_side(64, ImageAugmentConfig(min_scale=2.0, max_scale=2.0, max_aspect=1.0)) == 64
    assert needed_side(64, ImageAugmentConfig(randcrop=False)) == 64
