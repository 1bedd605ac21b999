import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from carillon.engine.data.decode.image import (
    ImageError,
    decode_image,
    decode_rgb,
    picture_extension,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """40 x 20: red left, blue right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image


def png_of_size(width: int, height: int) -> bytes:
    """A valid grey PNG of zeros, as small as zlib makes it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height), 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_five_formats_decode(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(corners(), form, **options)
    pixels = decode_image(data)
    assert pixels.shape == (20, 40, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    # JPEG's chroma is lossy: flat colours come back within a few levels.
    assert np.abs(pixels[5, 5].astype(int) - RED).max() <= 3
    assert np.abs(pixels[5, 35].astype(int) - BLUE).max() <= 3
    assert picture_extension(data) == form.lower().replace("jpeg", "jpg")


@pytest.mark.parametrize("form", ["JPEG2000", "TIFF", "ICO", "PPM", "TGA", "PCX", "PDF", "ICNS"])
def test_other_formats_of_pillow_are_refused(form: str) -> None:
    data = encoded(Image.new("RGB", (32, 32)), form)
    Image.init()
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, GIF or BMP"):
        decode_image(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"8BPS\0\1" + bytes(30),
        b"SIMPLE  =                    T",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"\0\0\0\x20ftypavif",
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, GIF or BMP"):
        decode_image(data)


@pytest.mark.parametrize("start", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_a_magic_number_alone_is_no_picture(start: bytes) -> None:
    for tail in (b"", b"\0" * 200, bytes(range(256)) * 4):
        with pytest.raises(ImageError):
            decode_image(start + tail)


def test_a_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png_of_size(22_000, 22_000)  # 470 KB that decode to 484 MB
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(ImageError, match=r"22000 x 22000 pixels; at most 64,000,000"):
        decode_image(data)


def test_the_limit_is_the_callers() -> None:
    data = encoded(corners(), "PNG")
    assert decode_image(data, max_pixels=800).shape == (20, 40, 3)
    with pytest.raises(ImageError, match="at most 799"):
        decode_image(data, max_pixels=799)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_pictures_are_refused(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ImageError):
            decode_image(data[: int(len(data) * share)])


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode_image(data)[8, 8].astype(int) - RED).max() <= 6


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    wide = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    pixels = decode_image(encoded(Image.fromarray(wide), "PNG"))
    assert np.array_equal(pixels[0, :, 0], wide[0] >> 8)


def test_transparency_is_put_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((1, 1), (0, 0, 255, 255))
    rgba.putpixel((2, 2), (0, 0, 0, 128))
    for form in ("PNG", "WEBP"):
        pixels = decode_image(encoded(rgba, form, lossless=True))
        assert tuple(pixels[0, 0]) == WHITE
        assert tuple(pixels[1, 1]) == BLUE
        assert tuple(pixels[2, 2]) == (127, 127, 127)


def test_a_palette_with_a_transparent_colour_is_put_on_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((3, 3), 1)
    for form in ("PNG", "GIF"):
        pixels = decode_image(encoded(palette, form, transparency=0))
        assert tuple(pixels[0, 0]) == WHITE
        assert tuple(pixels[3, 3]) == GREEN


def test_a_transparent_colour_of_grey_and_rgb_png_is_put_on_white() -> None:
    grey = decode_image(encoded(Image.new("L", (2, 2), 7), "PNG", transparency=7))
    assert tuple(grey[0, 0]) == WHITE
    rgb = decode_image(encoded(Image.new("RGB", (2, 2), RED), "PNG", transparency=RED))
    assert tuple(rgb[0, 0]) == WHITE


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, RED)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert tuple(decode_image(data)[4, 4]) == GREEN


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).convert("RGB")
    back = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    methods = [None, None, 0, 3, 1, 5, 4, 6, 2]  # Image.Transpose by EXIF orientation
    method = methods[back]
    stored = image if method is None else image.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_a_jpeg_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters = np.zeros((32, 48, 3), dtype=np.uint8)
    quarters[:16, :24], quarters[:16, 24:], quarters[16:, :24] = RED, GREEN, BLUE
    data = encoded(Image.fromarray(quarters), "JPEG", exif=exif, quality=95, subsampling=0)
    expected = np.asarray(decode_rgb(data)).astype(int)
    assert expected.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    assert np.abs(decode_image(data) - expected).max() <= 1


def test_a_jpeg_has_the_pixels_of_pillow() -> None:
    smooth = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    for subsampling in (0, 1, 2):
        for progressive in (False, True):
            picture = Image.fromarray(smooth).resize((201, 133), Image.Resampling.BICUBIC)
            data = encoded(picture, "JPEG", subsampling=subsampling, progressive=progressive)
            for min_side in (None, 60, 30, 16):
                ours = decode_image(data, min_side=min_side).astype(int)
                theirs = np.asarray(decode_rgb(data, min_side=min_side)).astype(int)
                assert np.abs(ours - theirs).max() <= 2  # another version of libjpeg-turbo


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    pixels = decode_image(encoded(Image.fromarray(grey), "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - grey[..., None]).max() <= 2


def test_a_jpeg_with_bytes_too_many_is_read_as_pillow_reads_it() -> None:
    data = encoded(corners(), "JPEG")
    table = data.index(b"\xff\xc4")
    padded = data[:table] + b"\0\0\0" + data[table:]
    assert np.array_equal(decode_image(padded), np.asarray(decode_rgb(padded)))


def test_a_jpeg_of_scans_without_end_is_refused() -> None:
    """A few KB may ask for each of many pixels a thousand times."""
    data = encoded(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    bomb = data[:-2] + scan * 500 + data[-2:]
    with pytest.raises(ImageError, match="16,000,000 pixels in 510 scans"):
        decode_image(bomb)
    with pytest.raises(ImageError, match="16,000,000 pixels in 510 scans"):
        decode_rgb(bomb)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"],
)
def test_a_damaged_exif_block_does_not_cost_the_picture(exif: bytes) -> None:
    data = encoded(corners(), "JPEG", exif=exif)
    assert decode_image(data).shape == (20, 40, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, GREEN), "PNG")
    pixels = decode_image(data)
    assert pixels.shape == (size[1], size[0], 3)
    assert tuple(pixels[-1, -1]) == GREEN


def test_a_jpeg_may_come_back_smaller_but_never_below_the_wish() -> None:
    data = encoded(corners().resize((800, 400)), "JPEG")
    assert decode_image(data, min_side=100).shape == (100, 200, 3)
    assert decode_image(data, min_side=101).shape == (200, 400, 3)
    assert decode_image(data, min_side=4000).shape == (400, 800, 3)
    assert np.abs(decode_image(data, min_side=100)[50, 30].astype(int) - RED).max() <= 3


def test_every_mutation_ends_in_pixels_or_image_error() -> None:
    generator = np.random.default_rng(7)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        intact = encoded(corners(), form)
        for _ in range(60):
            data = bytearray(intact)
            for position in generator.integers(0, len(data), 4):
                data[position] = generator.integers(0, 256)
            try:
                assert decode_rgb(bytes(data), max_pixels=100_000).mode == "RGB"
            except ImageError:
                continue


def test_a_header_that_is_cut_short_is_said_so() -> None:
    with pytest.raises(ImageError, match=r"^the picture's header is cut short$"):
        decode_image(b"GIF89a")
