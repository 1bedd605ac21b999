"""Hostile captions and pictures in a foreign tar: each ends in a row with its reason."""

import io
import json
import struct
import tarfile
import zlib
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from carillon.engine.data.curate.run import curate

STAGES = (
    {"type": "picture_size", "min_side": 16, "max_aspect": 100},
    {"type": "captions", "required": False},
    {"type": "language"},
    {"type": "pii"},
    {"type": "toxicity"},
    {"type": "blur", "action": "annotate"},
    {"type": "exact_duplicates"},
    {"type": "near_pictures"},
    {"type": "near_texts", "action": "annotate"},
)


def bomb() -> bytes:
    """A PNG header of 60,000 x 60,000 pixels over a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


def stored(picture: Image.Image, form: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **more)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.fixture(scope="module")
def outcome(tools: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The reason for every key that is not kept, and `kept` for the others."""
    folder = tmp_path_factory.mktemp("hostile")
    scene = [tools.scene(seed) for seed in range(16)]
    good = tools.jpeg(scene[0])
    pictures = {
        "good.jpg": good,
        "truncated.jpg": tools.jpeg(scene[1])[:900],
        "empty.jpg": b"",
        "bomb.png": bomb(),
        "thin.png": stored(Image.new("RGB", (1, 60_000)), "PNG"),
        "cmyk.jpg": stored(scene[2].convert("CMYK"), "JPEG"),
        "palette.png": stored(scene[3].quantize(64), "PNG", transparency=0),
        "moving.gif": stored(scene[4], "GIF", save_all=True, append_images=[scene[5]]),
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
        "pdf.jpg": b"%PDF-1.7 nothing",
    }
    texts: dict[str, object] = {
        "long": "a" * 1_000_000,
        "nul": "two\0 words \u202eturned\u202c and <b>marked</b> &amp; more of them",
        "surrogate": "half \ud800 a character",
        "nothing": "   ",
        "number": 7,
        "markup": "<script>alert(1)</script><svg onload=x>",
    }
    with tarfile.open(folder / "set.tar", "w") as tar:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        for number, (name, data) in enumerate(pictures.items()):
            add(name, data)
            caption = f"a drawing with the number {number} of several shapes on a ground"
            add(
                f"{name.partition('.')[0]}.json",
                json.dumps({"captions": {"en": [caption]}}).encode(),
            )
        for number, (key, text) in enumerate(texts.items()):
            add(f"{key}.jpg", tools.jpeg(scene[6 + number]))
            add(f"{key}.json", json.dumps({"captions": {"en": [text]}}).encode())
    curate(tools.pipeline(*STAGES, max_bad_share=0.9), [str(folder / "set.tar")], folder / "out")
    rows = pq.read_table(folder / "out" / "removed-000.parquet").to_pylist()
    told = dict.fromkeys([*(name.partition(".")[0] for name in pictures), *texts], "kept")
    return told | {row["key"]: f"{row['outcome']}: {row['reason']}" for row in rows}


@pytest.mark.parametrize(
    ("key", "begins"),
    [
        ("good", "kept"),
        ("truncated", "quarantined: the picture"),
        ("empty", "quarantined: the picture"),
        ("bomb", "quarantined: the picture's header cannot be read"),
        ("thin", "dropped: shorter side 1 is below 16"),
        ("cmyk", "kept"),
        ("palette", "kept"),
        ("moving", "kept"),
        ("svg", "quarantined: the picture's header cannot be read"),
        ("pdf", "quarantined: the picture's header cannot be read"),
        ("long", "quarantined: a caption of 1,000,000 characters"),
        ("nul", "kept"),
        ("surrogate", "quarantined: a caption holds a lone surrogate"),
        ("nothing", "quarantined: no caption is left after cleaning"),
        ("number", "quarantined: captions hold int 7"),
        ("markup", "quarantined: no caption is left after cleaning"),
    ],
)
def test_hostile_items_end_in_a_row_with_a_reason(
    outcome: dict[str, str], key: str, begins: str
) -> None:
    assert outcome[key].startswith(begins), outcome[key]
