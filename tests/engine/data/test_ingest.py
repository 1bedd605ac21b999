import argparse
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from carillon.engine.config import UserError
from carillon.engine.data import ingest_command as command
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.ingest import ingest, split_of
from carillon.engine.data.ingest_items import Columns
from carillon.engine.data.ingest_loading import FetchOptions
from carillon.engine.data.ingest_options import IngestOptions
from carillon.engine.data.ingest_order import Pace
from carillon.engine.data.shards import Dataset, RawSample, open_dataset


def picture(path: Path, *, size: tuple[int, int] = (12, 8), form: str | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path, form)
    return path.read_bytes()


def table(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def samples(dataset: Dataset) -> list[RawSample]:
    return [split.read(row) for split in dataset.splits.values() for row in range(len(split))]


def by_source(dataset: Dataset) -> dict[str, RawSample]:
    return {sample.meta["source"]: sample for sample in samples(dataset)}


def rejected(dataset: Dataset) -> dict[str, str]:
    path = dataset.path / "rejected.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {entry["image"]: entry["reason"] for entry in entries}


LENIENT = IngestOptions(max_bad_share=1.0)


def test_a_folder_with_texts_and_jsons(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    bytes_of_a = picture(root / "a.png")
    (root / "a.txt").write_text("a dog\n\nanother line\n")
    picture(root / "deep" / "b.v2.JPG", form="JPEG")
    meta = {"captions": {"de": ["ein Hund"]}, "license": "CC0-1.0", "label": 4}
    (root / "deep" / "b.v2.json").write_text(json.dumps(meta))
    picture(root / "lonely.png")
    (root / "notes.md").write_text("no picture")
    columns = Columns(default_language="en")
    options = IngestOptions(max_bad_share=0.5, licence="MIT")
    dataset, num_rejected = ingest([str(root)], tmp_path / "set", columns=columns, options=options)
    found = by_source(dataset)
    assert set(found) == {"photos/a.png", "photos/deep/b.v2.JPG"}
    first, second = found["photos/a.png"], found["photos/deep/b.v2.JPG"]
    assert first.medium("image") == bytes_of_a
    assert first.meta["captions"] == {"en": ["a dog", "another line"]}
    assert first.meta["licence"] == "MIT"
    assert second.meta["captions"] == {"de": ["ein Hund"]}
    assert (second.meta["licence"], second.meta["label"]) == ("CC0-1.0", 4)
    assert num_rejected == 1
    assert rejected(dataset) == {"lonely.png": "no caption in lonely.txt or lonely.json beside it"}
    assert dataset.name == "set"


def test_rows_of_one_picture_become_one_item(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.png")
    picture(tmp_path / "img" / "b.png")
    rows = [["file_name", "caption", "lang", "photographer"]]
    rows += [["img/a.png", "one", "en", "Ann"], ["./img/a.png", "two", "en", "Ann"]]
    rows += [["img/a.png", "un", "fr", "Ann"], ["img/a.png", "one", "en", "Ann"]]
    rows += [["img/b.png", "zwei, mit Komma", "de", ""]]
    dataset, _ = ingest([str(table(tmp_path / "p.csv", rows))], tmp_path / "set")
    found = by_source(dataset)
    assert found["p.csv/img/a.png"].meta["captions"] == {"en": ["one", "two"], "fr": ["un"]}
    assert found["p.csv/img/a.png"].meta["photographer"] == "Ann"
    assert found["p.csv/img/b.png"].meta["captions"] == {"de": ["zwei, mit Komma"]}


def test_caption_columns_with_languages(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = [["path", "caption_en", "caption_pt_BR"], ["a.png", "dog", "cão"]]
    found, _ = ingest([str(table(tmp_path / "x.tsv", rows, "\t"))], tmp_path / "one")
    assert samples(found)[0].meta["captions"] == {"en": ["dog"], "pt-BR": ["cão"]}
    rows = [["bild", "titre", "legende"], ["a.png", "chien", "Hund"]]
    columns = Columns(image="bild", captions=("fr=titre", "de=legende"))
    given = str(table(tmp_path / "y.csv", rows))
    found, _ = ingest([given], tmp_path / "two", columns=columns)
    assert samples(found)[0].meta["captions"] == {"fr": ["chien"], "de": ["Hund"]}


def test_jsonl_and_parquet_together(tmp_path: Path) -> None:
    data = picture(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "captions": {"en": ["x", "y"], "cs": "pes"}, "score": 0.5},
        {"image": "a.png", "captions": ["z"], "language": "en"},
    ]
    jsonl = tmp_path / "p.jsonl"
    jsonl.write_text("\ufeff" + "\n".join(json.dumps(line) for line in lines) + "\n\n{broken\n")
    columns = {
        "image": [{"bytes": data, "path": "inside.png"}, {"bytes": None, "path": "a.png"}],
        "text": ["from bytes", "from a path"],
        "language": ["en", "en"],
    }
    parquet = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), parquet)
    dataset, num_rejected = ingest([str(jsonl), str(parquet)], tmp_path / "set", options=LENIENT)
    found = by_source(dataset)
    assert found["p.jsonl/a.png"].meta["captions"] == {"en": ["x", "y", "z"], "cs": ["pes"]}
    assert found["p.jsonl/a.png"].meta["score"] == 0.5
    assert found["q.parquet/inside.png"].medium("image") == data
    assert found["q.parquet/a.png"].meta["captions"] == {"en": ["from a path"]}
    assert num_rejected == 1
    assert rejected(dataset)["row 3"].startswith("no JSON")


def test_keys_and_splits_follow_from_source_and_path_alone(tmp_path: Path) -> None:
    def build(root: Path, names: list[str], out: str) -> dict[str, tuple[str, str]]:
        for name in names:
            picture(root / f"{name}.png")
            (root / f"{name}.txt").write_text(name)
        options = IngestOptions(validation_share=0.3)
        dataset, _ = ingest([str(root)], tmp_path / out, options=options)
        found = {}
        for split in dataset.splits.values():
            for row in range(len(split)):
                sample = split.read(row)
                found[sample.meta["source"]] = (sample.key, split.name)
        return found

    names = [f"p{number}" for number in range(30)]
    here = build(tmp_path / "x" / "set", names, "a")
    moved = build(tmp_path / "y" / "set", [*names, "extra.one"], "b")
    assert here.items() <= moved.items()
    counts = [split for _, split in moved.values()].count("validation")
    assert 2 <= counts <= 17  # 31 x 0.3 = 9.3, three standard deviations of 2.6
    assert {split for _, split in here.values()} == {"train", "validation"}


def test_the_validation_share_is_met() -> None:
    splits = [split_of(f"k{number}", 0.1) for number in range(10_000)]
    assert 900 < splits.count("validation") < 1100  # three standard deviations of 30
    assert {split_of(f"k{number}", 0.0) for number in range(100)} == {"train"}


def test_large_pictures_shrink_only_when_asked(tmp_path: Path) -> None:
    root = tmp_path / "p"
    original = picture(root / "big.png", size=(400, 100))
    (root / "big.txt").write_text("big")
    small = picture(root / "small.png", size=(50, 60))
    (root / "small.txt").write_text("small")
    kept, _ = ingest([str(root)], tmp_path / "kept")
    assert by_source(kept)["p/big.png"].medium("image") == original
    shrunk, _ = ingest([str(root)], tmp_path / "shrunk", options=IngestOptions(max_size=100))
    found = by_source(shrunk)
    pixels = decode_image(found["p/big.png"].medium("image"))
    assert pixels.shape == (25, 100, 3)
    # A flat colour survives resizing and JPEG within a few levels.
    assert np.abs(pixels.astype(int) - (10, 200, 30)).max() <= 3
    assert found["p/small.png"].medium("image") == small


def hostile_folder(root: Path) -> None:
    picture(root / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    (root / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    (root / "fake.png").write_bytes(b"%PDF-1.7")
    (root / "empty.png").write_bytes(b"")
    picture(root / "blank.png")
    picture(root / "long.png")
    picture(root / "nul.png")
    picture(root / "bytes.png")
    for stem in ("good", "cut", "fake", "empty"):
        (root / f"{stem}.txt").write_text("fine")
    (root / "blank.txt").write_text(" \n<p>\n")
    (root / "long.txt").write_text("x" * 1_000_000)
    (root / "nul.txt").write_bytes(b"a\0b \xe2\x80\xaeright")
    (root / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    secret = root.parent / "secret.png"
    picture(secret)
    (root / "link.png").symlink_to(secret)
    (root / "link.txt").write_text("a link that points outside")
    os.mkfifo(root / "fifo.png")
    (root / "fifo.txt").write_text("never blocks")


@pytest.mark.parametrize("workers", [1, 2])
def test_hostile_items_are_listed_with_their_reason(tmp_path: Path, workers: int) -> None:
    hostile_folder(tmp_path / "p")
    options = IngestOptions(max_bad_share=0.9, workers=workers)
    dataset, num_rejected = ingest([str(tmp_path / "p")], tmp_path / "set", options=options)
    texts = {key: sample.meta["captions"] for key, sample in by_source(dataset).items()}
    assert texts == {"p/good.png": {"und": ["fine"]}, "p/nul.png": {"und": ["ab right"]}}
    reasons = rejected(dataset)
    assert num_rejected == len(reasons) == 8
    expected = {
        "cut.jpg": "cannot be decoded",
        "fake.png": "not a JPEG, PNG, WebP, GIF or BMP",
        "empty.png": "not a JPEG, PNG, WebP, GIF or BMP",
        "blank.png": "no caption is left",
        "long.png": "1,000,000 characters",
        "bytes.png": "decode",
        "link.png": "--allow-outside",
        "fifo.png": "no such media file",
    }
    for image, part in expected.items():
        assert part in reasons[image]


def test_too_many_bad_items_leave_nothing(tmp_path: Path) -> None:
    hostile_folder(tmp_path / "p")
    with pytest.raises(UserError, match=r"8 of 10 items are bad, above --max-bad-share 0\.1"):
        ingest([str(tmp_path / "p")], tmp_path / "out" / "set")
    assert list((tmp_path / "out").iterdir()) == []


def test_paths_of_a_table_stay_in_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    picture(secret)
    folder = tmp_path / "pairs"
    picture(folder / "a.png")
    (folder / "link.png").symlink_to(secret)
    rows = [["image", "caption"], ["a.png", "fine"], ["../secret.png", "up"]]
    rows += [[str(secret), "absolute"], ["link.png", "link"], ["gone.png", "gone"]]
    given = [str(table(folder / "p.csv", rows))]
    dataset, _ = ingest(given, tmp_path / "one", options=LENIENT)
    assert [sample.meta["captions"]["und"] for sample in samples(dataset)] == [["fine"]]
    assert sum("--allow-outside" in reason for reason in rejected(dataset).values()) == 3
    allowed = IngestOptions(max_bad_share=1.0, allow_outside=True)
    dataset, _ = ingest(given, tmp_path / "two", options=allowed)
    assert len(samples(dataset)) == 4
    assert list(rejected(dataset)) == ["gone.png"]


def test_bad_rows_cost_only_themselves(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    path = tmp_path / "p.csv"
    lines = [
        b"image,caption,lang",
        b"a.png,fine,en",
        b"b.png,too,many,fields",
        b"c.png,\xff\xfe,en",
    ]
    lines += [b",nothing,en", b"d.png,x,English (US)", b"d.png,,en"]
    path.write_bytes(b"\n".join(lines))
    dataset, _ = ingest([str(path)], tmp_path / "set", options=LENIENT)
    assert [sample.meta["captions"] for sample in samples(dataset)] == [{"en": ["fine"]}]
    reasons = rejected(dataset)
    assert reasons["row 2"] == "4 fields where the header has 3"
    assert "lone surrogate" in reasons["c.png"]
    assert reasons["row 4"] == "the column 'image' is empty"
    assert reasons["d.png"] == "no caption in this row"


def test_a_remote_picture_costs_its_row(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = [["image", "caption"], ["http://127.0.0.1/b.jpg", "far"], ["a.png", "near"]]
    given = [str(table(tmp_path / "p.csv", rows))]
    dataset, _ = ingest(given, tmp_path / "set", options=LENIENT)
    assert [sample.meta["captions"] for sample in samples(dataset)] == [{"und": ["near"]}]
    assert list(rejected(dataset)) == ["http://127.0.0.1/b.jpg"]
    assert "is not on the public internet" in rejected(dataset)["http://127.0.0.1/b.jpg"]
    with pytest.raises(UserError, match=r"1 of 2 items are bad.* the public internet \(1\)"):
        ingest(given, tmp_path / "strict")


def test_columns_that_are_not_used_do_no_harm(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    columns = {
        "image": ["a.png"],
        "text": pyarrow.array(["near"]).dictionary_encode(),
        "meta.score": [0.5],
        "taken": pyarrow.array([1], pyarrow.timestamp("ns")),
        "image.taken": pyarrow.array([1], pyarrow.timestamp("ns")),
        "due": pyarrow.array([2**62], pyarrow.timestamp("ms")),
        "vector": [[{"at": 1}]],
    }
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    dataset, _ = ingest([str(path)], tmp_path / "set")
    meta = samples(dataset)[0].meta
    assert meta == {
        "captions": {"und": ["near"]},
        "media": {"png": {"width": 12, "height": 8}},
        "meta.score": 0.5,
        "source": "p.parquet/a.png",
    }


def test_a_value_that_cannot_be_read_costs_its_row(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    texts = pyarrow.array([b"fine", b"\xff\xfe", b"too"])
    columns = {
        "image": ["a.png", "b.png", "c.png"],
        "text": pyarrow.StringArray.from_buffers(3, *texts.buffers()[1:]),
        "language": ["en", "en", "en"],
    }
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    dataset, _ = ingest([str(path)], tmp_path / "set", options=LENIENT)
    assert {text for sample in samples(dataset) for text in sample.meta["captions"]["en"]} == {
        "fine",
        "too",
    }
    assert list(rejected(dataset)) == ["row 2"]
    assert "a value cannot be read: 'utf-8' codec" in rejected(dataset)["row 2"]


def test_a_time_where_a_caption_should_be_is_no_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for number, unit in ((1, "ns"), (2**62, "ms")):
        columns = {"image": ["a.png"], "text": pyarrow.array([number], pyarrow.timestamp(unit))}
        path = tmp_path / "p.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(
            UserError, match=r"1 of 1 items are bad.*(a value cannot be read|holds no text)"
        ):
            ingest([str(path)], tmp_path / "set")


def test_a_parquet_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    twice = pyarrow.table([["a.png"], ["x"], ["y"]], names=["image", "text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(UserError, match="names a column twice"):
        ingest([str(tmp_path / "p.parquet")], tmp_path / "set")


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("a,b\n1,2\n", Columns(), r"columns a, b: none .* picture path.*--image-column"),
        ("image,b\n1,2\n", Columns(), r"columns image, b: none .* caption.*--caption-column"),
        ("image,caption\n", Columns(image="nope"), "no column 'nope'; it has image, caption"),
        ("image,text\n", Columns(captions=("de=nope",)), "no column 'nope'"),
        ("", Columns(), "the columns none"),
        ("image,image,text\n", Columns(), "names a column twice"),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, content: str, columns: Columns, message: str
) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        ingest([str(tmp_path / "p.csv")], tmp_path / "set", columns=columns)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", r"\.txt is none of \.csv, \.tsv, \.jsonl"),
        ("p.parquet", b"PAR1 no", "no parquet file"),
        ("p.csv", "image,text\n".encode("utf-16"), r"is UTF-16, and UTF-8 is read.*iconv"),
        ("p.jsonl", '{"image": 1}'.encode("utf-16"), r"is UTF-16, and UTF-8 is read.*iconv"),
        ("empty/x.md", b"", "holds no picture"),
    ],
)
def test_sources_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    given = path.parent if "/" in name else path
    with pytest.raises(UserError, match=message):
        ingest([str(given)], tmp_path / "set")


def test_missing_and_remote_sources_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ingest([str(tmp_path / "no.csv")], tmp_path / "set")
    with pytest.raises(UserError, match=r"of a web server a \.tar or a table"):
        ingest(["https://example.org/pairs"], tmp_path / "set")
    with pytest.raises(UserError, match="ftp:// cannot be read"):
        ingest(["ftp://host/pairs.csv"], tmp_path / "set")
    with pytest.raises(UserError, match="is compressed; unpack it first"):
        ingest([str(tmp_path / "x.tar.gz")], tmp_path / "set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 1.5}, "--validation-share 1.5 is out of range"),
        ({"max_bad_share": -0.1}, "--max-bad-share -0.1 is out of range"),
        ({"max_size": 0}, "at least one pixel"),
        ({"pace": Pace(per_host=0)}, "--per-host 0 is out of range"),
        ({"fetch": FetchOptions(allow_hosts=("a b",))}, "--allow-host: 'a b' is no host"),
        ({"fetch": FetchOptions(user_agent="a\r\nb")}, "must be printable ASCII"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ingest([str(tmp_path)], tmp_path / "set", options=IngestOptions(**options))


def test_two_sources_of_one_name_do_not_collide_silently(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        picture(tmp_path / parent / "p" / "a.png")
        (tmp_path / parent / "p" / "a.txt").write_text(parent)
    given = [str(tmp_path / parent / "p") for parent in ("x", "y")]
    dataset, num_rejected = ingest(given, tmp_path / "set", options=LENIENT)
    assert num_rejected == 1
    assert "another source of the same name" in rejected(dataset)["a.png"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png")
    rows = [["datei", "satz", "sprache"], ["a.png", "ein Hund", "de"]]
    given = str(table(tmp_path / "p.csv", rows))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = ["--image-column", "datei", "--caption-column", "satz"]
    options += ["--language-column", "sprache", "--licence", "CC0-1.0", "--name", "dogs"]
    out = tmp_path / "set"
    arguments = parser.parse_args([given, "--out", str(out), "--workers", "1", *options])
    assert command.main(arguments) == 0
    assert "train              1 items: image 1, text 1; texts: de 1" in capsys.readouterr().out
    dataset = open_dataset(out)
    assert dataset.name == "dogs"
    assert samples(dataset)[0].meta["licence"] == "CC0-1.0"
    with pytest.raises(UserError, match="exists"):
        command.main(arguments)


@pytest.mark.parametrize(
    ("out", "relation"), [("photos", "is"), (".", "contains"), ("photos/set", "lies inside")]
)
def test_a_set_is_never_written_over_its_source(tmp_path: Path, out: str, relation: str) -> None:
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a dog")
    (tmp_path / "photos" / "dataset.json").write_text('{"format": "carillon-shards"}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"{relation} the source .* Nothing was removed"):
        ingest([str(tmp_path / "photos")], tmp_path / out, options=IngestOptions(overwrite=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_the_place_of_unfinished_work_is_left_alone(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a dog")
    (tmp_path / ".set.ingest").mkdir()
    (tmp_path / ".set.ingest" / "mine").write_text("kept")
    with pytest.raises(UserError, match=r"holds something else.* Nothing was removed"):
        ingest([str(tmp_path / "photos")], tmp_path / "set")
    assert (tmp_path / ".set.ingest" / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("flag", "columns"),
    [
        ("--language", Columns(default_language="en us!")),
        ("--language", Columns(default_language="")),
        ("--caption-column", Columns(captions=("d e=legende",))),
    ],
)
def test_a_language_given_as_an_option_is_checked(
    tmp_path: Path, flag: str, columns: Columns
) -> None:
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a dog")
    with pytest.raises(UserError, match=f"^{flag}: .* is no language code like en, pt-BR"):
        ingest([str(tmp_path / "photos")], tmp_path / "set", columns=columns)
    assert not (tmp_path / "set").exists()
