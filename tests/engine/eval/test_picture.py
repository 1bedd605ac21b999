"""Pages hold what they should: frames by colour, text by ink, hostile captions as plain text."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carillon.engine.eval.fonts import choose_fonts, is_covered
from carillon.engine.eval.picture import LEFT, TILE, Found, Row, picture_grid
from carillon.engine.eval.text_layout import directed, lines_of, shown

GREEN = (22, 163, 74)
BLUE = np.full((20, 30, 3), (30, 60, 200), np.uint8)


def _page(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def _green_pixels(path: Path) -> np.ndarray:
    return (_page(path) == GREEN).all(axis=2)


def test_only_right_pictures_have_a_green_frame(tmp_path: Path) -> None:
    found = [Found(BLUE, 0.5, "one", False), Found(BLUE, 0.4, "two", True)]
    path = picture_grid(tmp_path / "grid.png", [Row("a query", found, "en")], "A title")
    green = _green_pixels(path)
    columns = np.flatnonzero(green.any(axis=0))
    second = LEFT + TILE + 16
    assert second - 5 <= columns.min() < columns.max() <= second + TILE + 5
    assert green.sum() > 4 * TILE
    unknown = [found._replace(is_right=None) for found in found]
    assert not _green_pixels(picture_grid(tmp_path / "none.png", [Row("q", unknown)], "t")).any()


def test_pictures_and_a_picture_query_are_drawn(tmp_path: Path) -> None:
    path = picture_grid(tmp_path / "g.png", [Row(BLUE, [Found(BLUE, 1.0, "", None)] * 7)], "t")
    is_blue = (abs(_page(path) - (30, 60, 200)) < 12).all(axis=2)
    assert is_blue[:, :LEFT].any()
    # Seven pictures at five a line: two lines, the second with two.
    lines = is_blue[:, LEFT:].any(axis=1)
    assert int((np.diff(lines.astype(int)) == 1).sum()) == 2
    tile_area = (TILE - 8) * (TILE - 8) * 20 // 30
    assert is_blue[:, LEFT:].sum() == pytest.approx(7 * tile_area, rel=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "\x00nul",
        "<script>x</script>&",
        "\u202eoverride",
        "lone \ud800 surrogate",
        "x" * 100_000,
        "",
    ],
)
def test_hostile_captions_are_drawn_as_text(tmp_path: Path, text: str) -> None:
    plain = [Found(BLUE, 0.1, text, True)]
    path = picture_grid(tmp_path / "grid.png", [Row(text, plain, text)], text)
    assert _page(path).shape[1] < 1200
    assert _green_pixels(path).any()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_page_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        picture_grid(tmp_path / "g.png", [Row("q", [Found(BLUE / 2, 0, "", None)])], "t")
    with pytest.raises(ValueError, match="needs rows"):
        picture_grid(tmp_path / "g.png", [], "t")
    assert not list(tmp_path.iterdir())


def test_right_to_left_text_is_shaped(tmp_path: Path) -> None:
    # Joined letters take less ink than the same letters kept apart by a non-joiner.
    def ink(text: str) -> int:
        page = _page(picture_grid(tmp_path / "g.png", [Row(text, [])], "t"))
        return int((page.sum(axis=2) < 384).sum())

    joined = "\u0643\u0644\u0628"
    assert ink(joined) != ink("\u200c".join(joined))
    assert ink(joined) > 0


def test_fonts_are_only_opened_as_needed() -> None:
    latin = choose_fonts(
        ["Un chien qui court, \u043f\u0440\u0438\u0432\u0435\u0442 \u0643\u0644\u0628"]
    )
    assert len(latin.files) == 1
    assert not latin.missing
    # A private-use character and a placeholder face: covered by nothing.
    assert choose_fonts(["ok \ue123"]).missing == {"\ue123"}
    assert is_covered("emoji style \ufe0f and joiner \u200d")
    assert not is_covered("\ue123")


def test_shown_keeps_text_and_drops_what_could_mislead() -> None:
    assert shown("a\x00b\u202ec\u2066d\ud800\n e") == "a bcd e"
    assert shown("\u0643\u0644\u0628 \U0001f415") == "\u0643\u0644\u0628 \U0001f415"
    assert directed("\u0643\u0644\u0628.") == "\u202b\u0643\u0644\u0628.\u202c"
    assert directed("12 dogs") == "12 dogs"


def test_lines_break_at_words_or_clusters_and_end_with_an_ellipsis() -> None:
    assert lines_of("a running dog", 5, 3) == ["a", "running", "dog"]
    assert lines_of("a running dog", 50, 3) == ["a running dog"]
    # Chinese breaks anywhere but before its punctuation.
    assert lines_of("\u4e00\u4e8c\u4e09\u3002\u56db", 3, 9) == [
        "\u4e00\u4e8c",
        "\u4e09\u3002\u56db",
    ]
    cut = lines_of("one two three four five six", 6, 2)
    assert len(cut) == 2
    assert cut[-1].endswith("\u2026")
    assert lines_of("", 5, 3) == [""]
