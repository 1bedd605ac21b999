import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, features

from carillon.engine.config import UserError
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.sets.build import is_heldout
from carillon.engine.data.sets.emoji_concepts import base_concept
from carillon.engine.data.sets.line_pictures import Style, check_shaping, draw_lines, draw_style
from carillon.engine.data.sets.npm import Package
from carillon.engine.data.sets.script_fonts import FONT_PACKAGES, SCRIPTS, faces_of, is_written_in
from carillon.engine.data.sets.text_lines import build_text_lines
from carillon.engine.data.shards import Dataset

WriteDeb = Callable[..., Path]
SamplesOf = Callable[..., dict[str, Any]]
Cldr = tuple[Package, Package]
FONTS = Path(get_data_path()) / "fonts" / "ttf"
SANS, MONO = ((FONTS / f"DejaVuSans{kind}.ttf").read_bytes() for kind in ("", "Mono"))
PLAIN = Style(
    font_size=40,
    margin=12,
    line_gap=0.3,
    turn_degrees=0.0,
    ink=(0, 0, 0),
    paper=(255, 255, 255),
    paper_end=(255, 255, 255),
    noise=0.0,
    blur=0.0,
    jpeg_quality=95,
    noise_seed=0,
)


@pytest.fixture
def packages(write_deb: WriteDeb, cldr: Cldr) -> Path:
    folder = "usr/share/fonts/truetype/noto"
    faces = {"Sans-Regular": SANS, "Serif-Bold": MONO, "SansArabic-Bold": SANS}
    write_deb(FONT_PACKAGES[0], {f"{folder}/Noto{name}.ttf": data for name, data in faces.items()})
    return write_deb(FONT_PACKAGES[1], {"usr/share/doc/none": b""})


def build(packages: Path, cldr: Cldr, out: Path, **options: Any) -> Dataset:
    arguments = {"languages": ("en", "fr", "ar"), "per_language": 60, **options}
    return build_text_lines(out, data=packages, names=cldr, **arguments)


def test_pictures_say_what_stands_where(
    packages: Path, cldr: Cldr, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(packages, cldr, tmp_path / "set"))
    assert len(samples) == 180
    assert {len(sample.meta["lines"]) for _, sample in samples.values()} == {1, 2, 3}
    assert {split for split, _ in samples.values()} == {"train", "heldout_text"}
    for key, (split, sample) in samples.items():
        meta, language = sample.meta, key.split("-")[0]
        assert meta["captions"] == {language: [" ".join(line["text"] for line in meta["lines"])]}
        assert {is_heldout(base_concept(one)) for one in meta["concepts"]} == {split != "train"}
        pixels = decode_image(sample.members["jpg"])
        size = {"width": pixels.shape[1], "height": pixels.shape[0]}
        assert meta["media"] == {"jpg": size}
        for line in meta["lines"]:
            left, top, right, bottom = line["box"]
            assert 0 <= left < right <= size["width"]
            assert 0 <= top < bottom <= size["height"]
            assert is_written_in(line["text"], SCRIPTS[language])
    written = {split: set[str]() for split in ("train", "heldout_text")}
    for split, sample in samples.values():
        written[split] |= {line["text"] for line in sample.meta["lines"]}
    assert len(written["heldout_text"]) > 5
    assert not written["train"] & written["heldout_text"]  # though the fox is named as the dog is
    _, arabic = samples["ar-00000"]
    assert (arabic.meta["script"], arabic.meta["font"]) == ("Arabic", "NotoSansArabic-Bold.ttf")
    assert arabic.meta["font_licence"] == "OFL-1.1"
    assert arabic.meta["licence"] == "Unicode-3.0"
    fonts = {sample.meta["font"] for _, sample in samples.values()}
    assert fonts == {"NotoSans-Regular.ttf", "NotoSerif-Bold.ttf", "NotoSansArabic-Bold.ttf"}


def test_a_seed_gives_the_same_bytes_in_any_number_of_processes(
    packages: Path, cldr: Cldr, tmp_path: Path
) -> None:
    first = build(packages, cldr, tmp_path / "a", per_language=20)
    again = build(packages, cldr, tmp_path / "b", per_language=20, workers=2)
    assert again.fingerprint == first.fingerprint
    other = build(packages, cldr, tmp_path / "c", per_language=20, seed=1)
    assert other.fingerprint != first.fingerprint


def ink_of(jpeg: bytes) -> np.ndarray:
    """Where a picture with PLAIN colours is dark."""
    return decode_image(jpeg).mean(axis=2) < 128


@pytest.mark.parametrize("turn_degrees", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("right_to_left", [False, True])
def test_polygons_hold_the_ink_of_their_line(turn_degrees: float, right_to_left: bool) -> None:
    style = replace(PLAIN, turn_degrees=turn_degrees)
    lines = ["Ågjy one", "a much longer second line"]
    picture = draw_lines(lines, SANS, style, right_to_left=right_to_left)
    ink = ink_of(picture.jpeg)
    assert ink.shape == (picture.height, picture.width)
    ys, xs = np.nonzero(ink)
    owned = np.zeros(len(xs), int)
    for polygon in picture.polygons:
        corners = np.array(polygon)
        inside = np.ones(len(xs), bool)
        for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            along = (end - start) / np.linalg.norm(end - start)
            # Signed distance from an edge, positive within a clockwise polygon.
            distance = along[0] * (ys + 0.5 - start[1]) - along[1] * (xs + 0.5 - start[0])
            inside &= distance > -1.5  # antialiasing and rotation spread ink by a pixel
        assert inside.any()
        owned += inside
        # The polygon is no larger than its ink: unturned, each side is touched within a pixel.
        if turn_degrees == 0:
            bounds = (xs[inside].min(), ys[inside].min(), xs[inside].max(), ys[inside].max())
            box = (*corners.min(axis=0), *(corners.max(axis=0) - 1))
            np.testing.assert_allclose(bounds, box, atol=1)
    assert owned.min() == 1, "ink outside of every line's polygon"
    (first_left, _), (second_left, _) = (polygon[0] for polygon in picture.polygons)
    assert (first_left > second_left + 50) == right_to_left


def gaps(text: str, **options: Any) -> int:
    """How many empty columns lie within a line's ink."""
    columns = ink_of(draw_lines([text], SANS, PLAIN, **options).jpeg).any(axis=0)
    return int((~np.trim_zeros(columns)).sum())


def test_arabic_letters_are_joined_and_run_from_right_to_left() -> None:
    assert gaps("bbbb") > 4
    assert gaps("ببببب", language="ar", right_to_left=True) == 0
    # Alef does not join to its left: one gap, at the right end of the word.
    word = ink_of(draw_lines(["اببب"], SANS, PLAIN, language="ar", right_to_left=True).jpeg)
    columns = np.trim_zeros(word.any(axis=0))
    assert np.nonzero(~columns)[0].mean() > len(columns) * 0.7


def test_marks_stand_over_their_letters() -> None:
    width = draw_lines(["ee"], SANS, PLAIN).width
    assert abs(draw_lines(["e\u0301e\u0301"], SANS, PLAIN).width - width) <= 1


def test_styles_can_be_read() -> None:
    for number in range(300):
        style = draw_style(random.Random(number))
        ink, paper = (np.dot(c, (0.299, 0.587, 0.114)) for c in (style.ink, style.paper))
        assert abs(ink - paper) >= 110
    one, other = (draw_style(random.Random(number)) for number in (1, 2))
    assert one != other
    assert draw_lines(["a"], SANS, one).jpeg != draw_lines(["a"], SANS, other).jpeg


def test_without_shaping_no_line_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(check_shaping()) == {"pillow", "raqm", "harfbuzz", "freetype2"}
    monkeypatch.setattr(features, "check", lambda name: name != "fribidi")
    with pytest.raises(UserError, match="Pillow cannot shape text here"):
        check_shaping()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ("en", "xx")}, "--languages en,xx: give each once, of en, de"),
        ({"languages": ()}, "give each once"),
        ({"per_language": 0}, "--per-language 0: 1 to"),
    ],
)
def test_bad_settings_are_refused(
    packages: Path, cldr: Cldr, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(packages, cldr, tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_a_font_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"hi cannot be drawn: none of NotoSansDevanagari-Reg.* in"):
        faces_of("hi", [])


def test_scripts_are_told_apart() -> None:
    assert is_written_in("naïve, 2!", SCRIPTS["en"])
    assert not is_written_in("naïve кот", SCRIPTS["en"])
    assert not is_written_in("123", SCRIPTS["en"])
    assert is_written_in("犬と猫ー", SCRIPTS["ja"])
    assert not is_written_in("犬と猫", SCRIPTS["zh"])
    assert len({script.name for script in SCRIPTS.values()}) >= 20
    with Image.open(io.BytesIO(draw_lines(["a"], SANS, PLAIN).jpeg)) as image:
        assert image.format == "JPEG"
