import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from carillon.engine.config import UserError
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.sets.build import LEFT_OUT, is_heldout
from carillon.engine.data.sets.stamps import LICENCE, PACKAGE, build_stamps
from carillon.engine.data.shards import Dataset

ROOT = "usr/share/tuxpaint/stamps"
COPYRIGHT = f"usr/share/doc/{PACKAGE}/copyright"
DRAWING = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="50pt" height="100pt">'
    '<rect width="50pt" height="50pt" fill="#00f"/></svg>'
)
WriteDeb = Callable[..., Path]
SamplesOf = Callable[..., dict[str, Any]]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 10), (255, 0, 0, 128)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def files(tone: bytes) -> dict[str, bytes]:
    below = {
        "animals/cat.png": png(),
        "animals/cat_mirror.png": png(),
        "animals/cat.txt": b"A cat.\nes.utf8=Un gato.\npt_BR.utf8=Um gato.\nzu.utf8=\n",
        "animals/cat.dat": b"nomirror\n",
        "animals/cat.ogg": tone,
        "animals/cat_desc.ogg": tone,
        "animals/cat_desc_es.ogg": tone,
        "animals/cat_desc_pt_BR.wav": tone,
        "animals/cat_desc_fr.ogg": b"OggS and no more",
        "animals/drawn/cat 2.svg": DRAWING.encode(),
        "animals/drawn/cat 2.txt": "The cat!\nsr@latin.utf8=Mačka.\n".encode(),
        "numbers/7.png": png(),
        "numbers/7.txt": b"Seven.\nfr.utf8=Sept.\n",
        "numbers/7_fr.ogg": tone,
        "numbers/7_desc_fr.ogg": tone,
        "odd/written.svg": DRAWING.replace("<rect", "<text>hi</text><rect").encode(),
        "odd/written.txt": b"Something written.\n",
        "odd/broken.png": b"\x89PNG\r\n\x1a\n and no more",
        "odd/broken.txt": b"Something broken.\n",
        "odd/nameless.png": png(),
        "odd/nobody_desc_es.ogg": tone,
    }
    return {COPYRIGHT: b"License: GPL-2\n"} | {f"{ROOT}/{n}": data for n, data in below.items()}


def build(write_deb: WriteDeb, files: dict[str, bytes], out: Path, **options: Any) -> Dataset:
    return build_stamps(out, data=write_deb(PACKAGE, files), **options)


def test_pictures_names_and_sounds_are_one_sample(
    write_deb: WriteDeb, files: dict[str, bytes], tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(write_deb, files, tmp_path / "set"))
    assert set(samples) == {"animals-cat", "animals-drawn-cat-2", "numbers-7"}
    split, cat = samples["animals-cat"]
    assert split == ("heldout_concept" if is_heldout("cat") else "train")
    assert cat.members["png"] == files[f"{ROOT}/animals/cat.png"]
    spoken = {"spoken-en.ogg", "spoken-es.ogg", "spoken-pt-br.wav"}
    assert set(cat.members) == {"png", "sound.ogg", *spoken}
    meta = cat.meta
    assert meta["captions"] == {"en": ["A cat."], "es": ["Un gato."], "pt-BR": ["Um gato."]}
    assert meta["transcripts"] == meta["captions"]
    assert meta["media"]["png"] == {"width": 20, "height": 10}
    facts = {"duration_s": 0.1, "sample_rate": 16_000, "num_channels": 1}
    assert meta["media"]["sound.ogg"] == {**facts, "role": "sound"}
    assert meta["media"]["spoken-pt-br.wav"] == {**facts, "role": "name", "language": "pt-BR"}
    assert "spoken-fr.ogg" in meta["damaged"]
    assert (meta["concept"], meta["category"], meta["licence"]) == ("cat", "animals", LICENCE)
    assert meta["licence_source"] == f"debian:{PACKAGE}=1.0-1 {COPYRIGHT}"
    assert meta["source"] == f"debian:{PACKAGE}=1.0-1 {ROOT}/animals/cat.png"


def test_a_number_that_is_spoken_twice_keeps_both(
    write_deb: WriteDeb, files: dict[str, bytes], tmp_path: Path, samples_of: SamplesOf
) -> None:
    _, seven = samples_of(build(write_deb, files, tmp_path / "set"))["numbers-7"]
    roles = {name: facts.get("role") for name, facts in seven.meta["media"].items()}
    assert roles == {"png": None, "spoken-fr.ogg": "name", "spoken-fr-2.ogg": "spoken sound"}
    assert seven.meta["transcripts"] == {"fr": ["Sept."]}


def test_drawings_are_fitted_in_a_box_with_their_transparency(
    write_deb: WriteDeb, files: dict[str, bytes], tmp_path: Path, samples_of: SamplesOf
) -> None:
    split, drawn = samples_of(build(write_deb, files, tmp_path / "set"))["animals-drawn-cat-2"]
    assert split == ("heldout_concept" if is_heldout("cat") else "train")  # with the other cat
    assert drawn.meta["concept"] == "cat"
    assert drawn.meta["captions"]["sr-Latn"] == ["Mačka."]
    assert "transcripts" not in drawn.meta
    with Image.open(io.BytesIO(drawn.members["webp"])) as image:
        assert (image.mode, image.height) == ("RGBA", 512)
        assert abs(image.width - 256) <= 2  # a size in points is rounded to pixels first
        assert image.getpixel((100, 100)) == (0, 0, 255, 255)
        assert image.getpixel((100, 500))[3] == 0
    assert tuple(decode_image(drawn.members["webp"])[500, 100]) == (255, 255, 255)


def test_what_cannot_be_used_is_listed(
    write_deb: WriteDeb, files: dict[str, bytes], tmp_path: Path
) -> None:
    dataset = build(write_deb, files, tmp_path / "set")
    lines = map(json.loads, (dataset.path / LEFT_OUT).read_text().splitlines())
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons.keys() == {
        f"{ROOT}/odd/nameless.png",
        f"{ROOT}/odd/nobody_desc_es.ogg",
        "odd-written",
        "odd-broken",
    }
    assert "<text" in reasons["odd-written"]


def test_the_same_package_gives_the_same_bytes(
    write_deb: WriteDeb, files: dict[str, bytes], tmp_path: Path
) -> None:
    one = build(write_deb, files, tmp_path / "one")
    assert build(write_deb, files, tmp_path / "two", workers=2).fingerprint == one.fingerprint


@pytest.mark.parametrize(
    ("gone", "message"),
    [(COPYRIGHT, "does not state its licence"), (ROOT, "holds no stamps under")],
)
def test_a_package_that_is_another_is_refused(
    write_deb: WriteDeb, files: dict[str, bytes], tmp_path: Path, gone: str, message: str
) -> None:
    left = {name: data for name, data in files.items() if not name.startswith(gone)}
    with pytest.raises(UserError, match=message):
        build(write_deb, left, tmp_path / "set")
    assert not (tmp_path / "set").exists()
