"""Sources beside folders of pictures and tables of paths: tars, stores, URLs, datasets folders,
sound and video with what is said in them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from carillon.engine.config import UserError
from carillon.engine.data import store
from carillon.engine.data.ingest import ingest
from carillon.engine.data.ingest_items import Columns
from carillon.engine.data.ingest_loading import FetchOptions
from carillon.engine.data.ingest_options import IngestOptions
from carillon.engine.data.ingest_tars import read_tar
from carillon.engine.data.items import read_items
from carillon.engine.data.retry import RetryPolicy
from carillon.engine.data.samples import RawSample
from carillon.engine.data.shards import Dataset


def png(number: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def sound(seconds: float = 0.5, form: str = "WAV", rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((int(seconds * rate), 2)), rate, format=form)
    return buffer.getvalue()


def video(num_frames: int = 10) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((16, 32, 3), number * 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


LENIENT = IngestOptions(max_bad_share=1.0)


def taken(
    given: str | list[str], out: Path, **changes: Any
) -> tuple[Dataset, dict[str, RawSample]]:
    columns = changes.pop("columns", None)
    options = IngestOptions(**{"max_bad_share": 1.0, **changes})
    dataset, _ = ingest([given], out, columns=columns, options=options)
    samples = [split.read(row) for split in dataset.splits.values() for row in range(len(split))]
    return dataset, {sample.meta["source"]: sample for sample in samples}


def reasons(dataset: Dataset) -> dict[str, str]:
    lines = (dataset.path / "rejected.jsonl").read_text().splitlines()
    return {entry["image"]: entry["reason"] for entry in map(json.loads, lines)}


SRT = """1
00:00:01,000 --> 00:00:02,500
<i>Hello</i> there

2
00:00:03,000 --> 00:00:02,000
backwards

3
00:00:04,000 --> 00:00:05,250 X1:1
two
lines
"""
VTT = """WEBVTT - x
NOTE a note

STYLE
::cue {}

00:01.000 --> 00:02.500 align:start
<v Ann>Hallo

intro
01:00:04.000 --> 01:00:05.000
Welt
"""
WHISPER = {
    "text": " Bonjour le monde",
    "language": "fr",
    "segments": [
        {"id": 0, "start": 0.0, "end": 0.5, "text": " Bonjour"},
        {"id": 1, "start": 0.5, "end": float(1), "text": " le monde"},
        {"id": 2, "start": "x", "end": 2, "text": "odd"},
    ],
}


def test_sound_and_video_with_subtitles_and_transcripts(tmp_path: Path) -> None:
    root = tmp_path / "talks"
    root.mkdir()
    (root / "a.mp4").write_bytes(video())
    (root / "a.en.srt").write_text(SRT)
    (root / "a.de.vtt").write_text(VTT)
    (root / "b.wav").write_bytes(sound())
    (root / "b.txt").write_text("first line\nsecond line\n")
    (root / "c.flac").write_bytes(sound(form="FLAC"))
    (root / "c.json").write_text(json.dumps(WHISPER))
    (root / "d.ogg").write_bytes(sound(form="OGG"))
    (root / "e.mp3").write_bytes(sound(form="MP3"))
    (root / "e.srt").write_text("no cue at all")
    (root / "f.wav").write_bytes(sound(rate=4000))
    (root / "f.txt").write_text("too slow")
    (root / "g.mp4").write_bytes(video()[:40])
    (root / "g.txt").write_text("cut")
    dataset, found = taken(str(root), tmp_path / "set", columns=Columns(default_language="en"))
    a, b, c = (found[f"talks/{name}"] for name in ("a.mp4", "b.wav", "c.flac"))
    assert a.meta["segments"] == [
        {"start_s": 1.0, "end_s": 2.5, "text": "Hello there", "language": "en"},
        {"start_s": 4.0, "end_s": 5.25, "text": "two lines", "language": "en"},
        {"start_s": 1.0, "end_s": 2.5, "text": "Hallo", "language": "de"},
        {"start_s": 3604.0, "end_s": 3605.0, "text": "Welt", "language": "de"},
    ]
    assert a.meta["segments_skipped"] == 1
    assert a.meta["transcripts"] == {"en": ["Hello there", "two lines"], "de": ["Hallo", "Welt"]}
    assert a.meta["media"] == {
        "mp4": {"width": 32, "height": 16, "duration_s": 2.0, "fps": 5.0, "num_frames": 10}
    }
    assert b.meta["transcripts"] == {"en": ["first line", "second line"]}
    assert b.meta["media"] == {"wav": {"sample_rate": 16_000, "num_channels": 2, "duration_s": 0.5}}
    assert [segment["text"] for segment in c.meta["segments"]] == ["Bonjour", "le monde"]
    assert c.meta["transcripts"] == {"fr": ["Bonjour", "le monde"]}
    assert (list(c.members), "captions" in c.meta) == (["flac"], True)
    why = reasons(dataset)
    assert why["d.ogg"].startswith("no caption in d.txt")
    assert "no text with times" in why["e.mp3"]
    assert "sampling rate of 4000 Hz" in why["f.wav"]
    assert "the video cannot be decoded" in why["g.mp4"]
    split = dataset.manifest.splits["train"]
    assert dict(split.modalities) == {"audio": 2, "video": 1, "text": 3}
    rows = read_items(dataset.path / str(split.shards[0].items)).to_pylist()
    assert {row["source"]: row["duration_s"] for row in rows}["talks/a.mp4"] == 2.0


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    member.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
    tar.addfile(member, io.BytesIO(data))


def hostile_tar(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "./good.png", png(1))
        add(tar, "./good.json", json.dumps({"captions": {"en": ["good"]}, "n": 1}).encode())
        add(tar, "../up.png", png(2))
        add(tar, "/absolute.png", png(3))
        add(tar, "link.png", kind=tarfile.SYMTYPE)
        add(tar, "hard.png", kind=tarfile.LNKTYPE)
        add(tar, "code.pkl", b"cos\nsystem\n(S'touch x'\ntR.")
        add(tar, "code.pyd", b"MZ")
        add(tar, "text.txt", b"alone")
        add(tar, "talk.frames.png", png(4))
        add(tar, "talk.wav", sound())
        add(tar, "talk.en.txt", b"what is said")
        add(tar, "silent.png", png(5))


HOSTILE = {
    "../up.png": "leaves the folder",
    "/absolute.png": "leaves the folder",
    "link.png": "a link or special file",
    "hard.png": "a link or special file",
    "code.pkl": ".pkl is no medium",
    "code.pyd": ".pyd is no medium",
    "text": "a text without media",
    "silent": "no caption",
}


@pytest.mark.parametrize("kind", ["local", "s3", "web"])
def test_tars_are_read_by_name_and_never_extracted(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    hostile_tar(tmp_path / "x.tar")
    given = str(tmp_path / "x.tar")
    if kind == "s3":
        s3 = request.getfixturevalue("s3")
        s3.put_object(Bucket="bucket", Key="x.tar", Body=(tmp_path / "x.tar").read_bytes())
        given = "s3://bucket/x.tar"
    elif kind == "web":
        web = request.getfixturevalue("web")
        web.routes["/x.tar"] = (tmp_path / "x.tar").read_bytes()
        given = web.url("/x.tar")
    dataset, found = taken(given, tmp_path / "set")
    assert set(found) == {"x.tar/good", "x.tar/talk"}
    assert found["x.tar/good"].members == {"png": png(1)}
    assert found["x.tar/good"].meta["n"] == 1
    talk = found["x.tar/talk"]
    assert talk.members == {"frames.png": png(4), "wav": sound()}
    assert talk.meta["transcripts"] == {"en": ["what is said"]}
    why = reasons(dataset)
    assert set(why) == set(HOSTILE)
    assert [name for name, part in HOSTILE.items() if part not in why[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "x.tar"]


def test_a_damaged_tar_gives_what_stands_before_the_damage(tmp_path: Path) -> None:
    hostile_tar(tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:2600])
    dataset, found = taken(str(tmp_path / "x.tar"), tmp_path / "set")
    assert list(found) == ["x.tar/good"]
    assert "truncated" in reasons(dataset)["the rest of the archive"]
    with pytest.raises(UserError, match=r"x\.tgz is compressed; unpack it first"):
        ingest([str(tmp_path / "x.tgz")], tmp_path / "other")


def test_a_folder_in_an_object_store(s3: Any, tmp_path: Path) -> None:
    for name, data in {
        "set/b/2.png": png(2),
        "set/b/2.txt": b"two",
        "set/1.png": png(1),
        "set/1.json": b'{"captions": {"de": ["eins"]}, "license": "CC0-1.0"}',
        "set/3.png": png(3),
        "set/talk.wav": sound(),
        "set/talk.fr.srt": SRT.encode(),
    }.items():
        s3.put_object(Bucket="bucket", Key=name, Body=data)
    dataset, found = taken("s3://bucket/set", tmp_path / "set", licence="MIT", licence_source="x")
    assert {name: sample.meta["captions"] for name, sample in found.items()} == {
        "set/1.png": {"de": ["eins"]},
        "set/b/2.png": {"und": ["two"]},
        "set/talk.wav": {},
    }
    assert found["set/1.png"].meta["licence"] == "CC0-1.0"
    two = found["set/b/2.png"].meta
    assert (two["licence"], two["licence_source"]) == ("MIT", "x")
    assert list(reasons(dataset)) == ["3.png"]
    with pytest.raises(UserError, match="no such object, folder or bucket"):
        ingest(["s3://bucket/set/b/nothing"], tmp_path / "none")


def test_a_store_that_fails_stops_the_ingest_and_costs_no_item(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is not there is a rejection."""
    monkeypatch.setenv("CARILLON_BLOCK_CACHE_GB", "0")
    quick = RetryPolicy(max_tries=2, first_pause_s=0.01, longest_pause_s=0.02, deadline_s=30)
    monkeypatch.setattr(store, "POLICY", quick)
    hostile_tar(tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    web.routes["/x.tar"] = content
    given = web.url("/x.tar")
    list(read_tar(given))
    left = [len(web.seen) + 1]  # enough to list the members, and to ask for the first one's facts

    def route(request: Any) -> None:
        left[0] -= 1
        request.give(content) if left[0] >= 0 else request.answer(b"", status=503)

    web.routes["/x.tar"] = route
    with pytest.raises(UserError, match="HTTP status 503"):  # at the listing, or at an item
        ingest([given], tmp_path / "set", options=LENIENT)
    web.routes["/x.tar"] = content
    _, found = taken(given, tmp_path / "set")
    assert len(found) == 2


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_lists_of_urls_as_img2dataset_has_them(
    web: Any, s3: Any, tmp_path: Path, form: str
) -> None:
    web.routes["/a.png"] = png(1)
    web.routes["/b"] = png(2)
    s3.put_object(Bucket="bucket", Key="c.png", Body=png(3))
    rows = [
        {"URL": web.url("/a.png"), "TEXT": "one", "similarity": 0.5, "NSFW": "UNLIKELY"},
        {"URL": web.url("/b"), "TEXT": "two", "similarity": 0.25, "NSFW": "UNSURE"},
        {"URL": "s3://bucket/c.png", "TEXT": "three", "similarity": 0.125, "NSFW": "UNLIKELY"},
        {"URL": "gopher://x/y", "TEXT": "four", "similarity": 0.1, "NSFW": "UNLIKELY"},
        {"URL": web.url("/a.png"), "TEXT": "one again", "similarity": 0.5, "NSFW": "x"},
    ]
    path = tmp_path / f"list.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "csv":
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text("\n".join(",".join(map(str, line)) for line in lines))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    fetch = FetchOptions(allow_hosts=(web.address,))
    dataset, found = taken(str(path), tmp_path / "set", fetch=fetch)
    assert found[web.url("/a.png")].meta["captions"] == {"und": ["one", "one again"]}
    assert found[web.url("/b")].members == {"png": png(2)}
    assert found["list." + form + "/s3://bucket/c.png"].members == {"png": png(3)}
    assert float(found[web.url("/a.png")].meta["similarity"]) == 0.5
    assert reasons(dataset) == {"gopher://x/y": "gopher:// is nothing that can be fetched"}

    s3.put_object(Bucket="bucket", Key=f"lists/list.{form}", Body=path.read_bytes())
    remote, again = taken(f"s3://bucket/lists/list.{form}", tmp_path / "remote", fetch=fetch)
    assert remote.fingerprint == dataset.fingerprint
    assert set(again) == set(found)


def test_rows_of_one_medium_need_not_be_neighbours(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png())
    rows = ["image,caption,lang", "a.png,one,en", "b.png,two,en", "a.png,eins,de", "b.png,zwei,de"]
    (tmp_path / "p.csv").write_text("\n".join(rows))
    _, found = taken(str(tmp_path / "p.csv"), tmp_path / "set")
    assert [sample.meta["captions"] for sample in found.values()] == [
        {"en": ["one"], "de": ["eins"]},
        {"en": ["two"], "de": ["zwei"]},
    ]


def features(**kinds: Any) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": kinds}}).encode()}


def image_table(numbers: range) -> pa.Table:
    columns = {
        "image": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers],
        "label": pa.array([n % 2 for n in numbers], pa.int64()),
        "caption": [[f"one of {n}", f"two of {n}"] for n in numbers],
    }
    classes = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    return pa.table(columns).replace_schema_metadata(features(**classes))


def test_a_datasets_folder_as_a_repository_has_it(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    (root / "data").mkdir(parents=True)
    pq.write_table(image_table(range(3)), root / "data" / "train-00000-of-00002.parquet")
    pq.write_table(image_table(range(3, 5)), root / "data" / "train-00001-of-00002.parquet")
    pq.write_table(image_table(range(5, 6)), root / "data" / "val-00000-of-00001.parquet")
    columns = Columns(default_language="en")
    dataset, found = taken(str(root), tmp_path / "set", columns=columns)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 5,
        "validation": 1,
    }
    sample = found["repo/data/train-00001-of-00002.parquet#1"]
    assert sample.members == {"png": png(3)}
    assert sample.meta["captions"] == {"en": ["one of 3", "two of 3"]}
    assert sample.meta["label"] == "dog"


def test_a_folder_of_lists_in_parts(web: Any, tmp_path: Path) -> None:
    root = tmp_path / "lists"
    root.mkdir()
    for part in range(2):
        web.routes[f"/{part}"] = png(part)
        table = pa.table({"url": [web.url(f"/{part}")], "caption": [f"part {part}"]})
        pq.write_table(table, root / f"part-{part}.parquet")
    fetch = FetchOptions(allow_hosts=(web.address,))
    _, found = taken(str(root), tmp_path / "set", fetch=fetch)
    assert [sample.members for sample in found.values()] == [{"png": png(0)}, {"png": png(1)}]
    (root / "beside.png").write_bytes(png(7))
    (root / "beside.txt").write_text("a picture makes it a folder of pictures")
    _, found = taken(str(root), tmp_path / "pictures")
    assert list(found) == ["lists/beside.png"]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_a_datasets_folder_as_save_to_disk_writes_it(tmp_path: Path, form: str) -> None:
    root = tmp_path / "saved"
    (root / "test").mkdir(parents=True)
    (root / "dataset_dict.json").write_text('{"splits": ["test"]}')
    (root / "test" / "state.json").write_text("{}")
    (root / "outside.wav").write_bytes(sound(0.25))
    table = pa.table(
        {
            "audio": [
                {"bytes": sound(), "path": "a.wav"},
                {"bytes": None, "path": "outside.wav"},
                {"bytes": None, "path": "../../etc/passwd"},
                {"bytes": None, "path": None},
            ],
            "spectrogram": [{"bytes": png(n), "path": None} for n in range(4)],
            "transcription": ["hello", "world", "x", None],
            "language": ["en", "en", "en", "en"],
        }
    )
    path = root / "test" / "data-00000-of-00001.arrow"
    make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)
    dataset, found = taken(str(root), tmp_path / "set")
    assert list(dataset.splits) == ["test"]
    first, second = (found[f"saved/test/data-00000-of-00001.arrow#{n}"] for n in (1, 2))
    assert first.members == {"wav": sound(), "spectrogram.png": png(0)}
    assert first.meta["transcripts"] == {"en": ["hello"]}
    assert second.members["wav"] == sound(0.25)
    why = reasons(dataset)
    assert "--allow-outside" in why["test/data-00000-of-00001.arrow#3"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        ingest([str(root)], tmp_path / "cut", options=LENIENT)
