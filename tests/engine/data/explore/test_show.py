"""Pages of samples: which are shown, what their media look like, and that their text stays text."""

import base64
import io
import re
import runpy
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carillon.engine.data.explore.panels import Panel, panels_of
from carillon.engine.data.explore.sound_picture import (
    SPECTRUM_HEIGHT,
    WAVE_HEIGHT,
    sound_picture,
)
from carillon.engine.data.samples import RawSample
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset

CLIPS = runpy.run_path(str(Path(__file__).parents[1] / "decode" / "clips.py"))


class Page(HTMLParser):
    """The elements of a page, its texts, and the keys of its articles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def pictures(self) -> list[np.ndarray]:
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        data = [base64.b64decode(source.partition(",")[2]) for source in sources]
        return [np.array(Image.open(io.BytesIO(one)).convert("RGB")) for one in data]


def test_html_has_every_item_with_its_media_and_texts(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str]
) -> None:
    assert "8 of 8 items" in run("show", "small", "--out", "page.html")
    page = Page(tmp_path / "page.html")
    assert page.count("article") == 8
    for text in ("picture0", "une tache 3", "spoken words 1", "مرحبا", "CC-BY-4.0", "Ada"):
        assert text in page.texts
    pictures = page.pictures()
    assert len(pictures) == 6
    assert pictures[0].shape == (32, 48, 3)
    assert (np.abs(pictures[0].astype(int) - (220, 40, 40)) <= 3).all()
    addresses = [x for _, a in page.tags for n, x in a.items() if n in ("src", "href")]
    assert addresses
    assert all(str(x).startswith("data:image/") for x in addresses)


def test_the_same_command_gives_the_same_page(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str]
) -> None:
    for name in ("a", "b"):
        run("show", "small", "--out", f"{name}.html", "--num", "3", "--seed", "5")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    run("show", "small", "--out", "c.html", "--num", "3", "--seed", "6")
    assert Page(tmp_path / "c.html").count("article") == 3
    assert (tmp_path / "c.html").read_bytes() != (tmp_path / "a.html").read_bytes()


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["--key", "text1", "--key", "picture3"], ["text1", "picture3"]),
        (["--rows", "0-1, 4"], ["picture0", "picture1", "sound1"]),
        (["--rows", "0", "--split", "held_out"], ["picture3"]),
        (["--where", "modality=audio"], ["sound0", "sound1"]),
        (["--where", "author=Ada", "--split", "train"], ["picture1", "sound1"]),
        (["--split", "held_out"], ["picture3"]),
    ],
)
def test_chosen_items(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str], words: list[str], keys: list[str]
) -> None:
    run("show", "small", "--out", "page.html", *words)
    text = (tmp_path / "page.html").read_text()
    assert re.findall(r"<h2><bdi>(.*?)</bdi>", text) == keys


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "page.pdf"], "ends in .html or .png"),
        (["--rows", "9"], "the split has rows 0 to 6"),
        (["--rows", "2-1"], "the split has rows"),
        (["--rows", "x"], "give rows and ranges"),
        (["--split", "test"], "the set has train, held_out"),
        (["--key", "a", "--rows", "1"], "give one of"),
        (["--key", "absent"], "has no item 'absent'"),
        (["--where", "language=xx"], "no item of .* fits language=xx"),
        (["--num", "0"], "1 to 1,000 are allowed"),
        (["--columns", "99"], "1 to 20 are allowed"),
        (["--seed", "-1"], "0 or more"),
        (["--out", "small"], "ends in"),
    ],
)
def test_refusals(
    dataset: Dataset, run: Callable[..., str], words: list[str], message: str
) -> None:
    assert re.search(message, run("show", "small", "--out", "page.html", *words, code=2))
    assert not Path("page.html").exists()


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202egpj.exe\x1b[31m\"'&lt;b&gt;"


@pytest.mark.parametrize("name", ["page.html", "page.png"])
def test_hostile_text_stays_text(tmp_path: Path, run: Callable[..., str], name: str) -> None:
    """Captions are cleaned when they are written; other fields are shown as they came."""
    with ShardWriter(tmp_path / "small", name=HOSTILE, source={}) as writer:
        meta = {"captions": {"en": [HOSTILE + " ok"], HOSTILE: ["y"]}, "licence": HOSTILE}
        segments = [{"start_s": HOSTILE, "end_s": 1, "text": HOSTILE, "language": HOSTILE}]
        writer.write("k", {}, meta | {"author": HOSTILE, "segments": segments})
    said = run("show", "small", "--out", name, "--where", "author~onerror")
    assert (tmp_path / name).is_file()
    assert "\u202e" not in said
    if name.endswith(".html"):
        page = Page(tmp_path / name)
        assert page.count("script") == page.count("img") == page.count("b") == 0
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "\u202e" not in text
        assert "\x1b" not in text
        assert "default-src 'none'" in text
        assert any("<script>alert(1)</script>" in one for one in page.texts)
        assert {"onerror"} & {x for _, attributes in page.tags for x in attributes} == set()


def test_png_has_cards_beside_each_other(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str]
) -> None:
    run("show", "small", "--out", "page.png", "--columns", "2")
    page = np.array(Image.open(tmp_path / "page.png").convert("RGB"))
    assert page.shape[1] == 2 * 340 + 20
    for colour in ((220, 40, 40), (40, 160, 60), (40, 70, 220), (230, 200, 40)):
        near = (np.abs(page.astype(int) - colour) <= 3).all(-1)
        assert near.sum() > 40 * 30


def test_characters_without_a_font_are_told(
    dataset: Dataset, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carillon.engine.eval.fonts._candidates", lambda folders: ())
    with ShardWriter(Path("lone"), name="lone", source={}) as writer:
        writer.write("k", {}, {"captions": {"ja": ["犬が"]}})
    assert "no font of this machine draws 2 of" in run("show", "lone", "--out", "page.png")
    assert "font" not in run("show", "small", "--out", "page.png")


def test_a_damaged_item_is_shown_with_its_reason(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str]
) -> None:
    shard = dataset.path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"a patch 1")] ^= 1
    shard.write_bytes(content)
    assert "1 cannot be read" in run("show", "small", "--out", "page.html")
    assert any("checksum" in text for text in Page(tmp_path / "page.html").texts)


def test_bytes_that_are_no_medium_have_a_reason() -> None:
    sample = RawSample("k", {"jpg": b"no", "flac": b"no", "mp4": b"no"}, {})
    panels = panels_of(sample)
    assert [panel.modality for panel in panels] == ["image", "audio", "video"]
    assert [panel.pixels for panel in panels] == [None] * 3
    assert all(panel.note.startswith(("jpg: ", "flac: ", "mp4: ")) for panel in panels)


def test_a_video_is_a_strip_in_the_order_of_time() -> None:
    (panel,) = panels_of(RawSample("k", {"mp4": CLIPS["video"]("mp4")}, {}))
    assert "3 s, 10 frames/s, h264" in panel.note
    greys = [tile[-20:-10, -20:-10].mean() for tile in _tiles(panel)]
    assert len(greys) == 6
    assert greys == sorted(greys)
    assert greys[-1] - greys[0] > 80


def _tiles(panel: Panel) -> list[np.ndarray]:
    """The cells of a strip of two rows of three."""
    assert panel.pixels is not None
    rows = np.array_split(panel.pixels, 2, axis=0)
    return [tile for row in rows for tile in np.array_split(row, 3, axis=1)]


def test_a_tone_is_a_line_at_its_frequency() -> None:
    """Half silence, half 1 kHz: nothing on the left, one bright line on the right."""
    rate = 16_000
    times = np.arange(rate) / rate
    samples = np.where(times < 0.5, 0, np.sin(2 * np.pi * 1000 * times)).astype(np.float32)
    drawn = sound_picture(samples, rate, width=200)
    assert drawn.shape == (WAVE_HEIGHT + SPECTRUM_HEIGHT, 200, 3)
    spectrum = drawn[WAVE_HEIGHT:].astype(int).sum(-1)
    assert spectrum[:, :90].max() <= spectrum[:, 150].min() + 20
    mel = 2595 * np.log10(1 + 1000 / 700) / (2595 * np.log10(1 + 8000 / 700))
    brightest = SPECTRUM_HEIGHT - 1 - spectrum[:, 150].argmax()
    assert abs(brightest - mel * (SPECTRUM_HEIGHT - 1)) <= 2
    wave = drawn[:WAVE_HEIGHT]
    ink = (wave == (37, 99, 235)).all(-1).sum(0)
    assert ink[:95].max() <= 1
    assert ink[110:].min() > WAVE_HEIGHT * 0.9


@pytest.mark.parametrize("length", [1, 2, 100, 5000])
def test_sounds_of_any_length_are_drawn(length: int) -> None:
    drawn = sound_picture(np.ones(length, np.float32), 8000, width=64)
    assert drawn.shape[1] == 64
