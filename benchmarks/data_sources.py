"""What `make prove-data` ingests: photos behind a web server and in an object store, with planted
duplicates, bad texts and licences for curation, and items that are broken, endless or hostile."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from local_servers import Route, Web, endless, redirect, short, silent, slowly, status, wished
from PIL import Image, ImageFilter
from record import FLICKR8K, flickr8k_shards

from carillon.engine.data.shards import open_dataset

NUM_WEB, NUM_STORE, NUM_EVALUATION = 600, 200, 100
STORE_SOURCES = ("s3://bucket/photos", "s3://bucket/tars/own.tar", "s3://bucket/tars/hostile.tar")
MISTAKES = 4  # times that each kind of bad item comes
SPAM = "buy cheap buy cheap buy cheap buy cheap buy cheap"
FREE, CLOSED = "LicenseRef-research", "LicenseRef-all-rights-reserved"


class Photo(NamedTuple):
    jpeg: bytes
    captions: dict[str, list[str]]


def photos(start: int, end: int) -> Iterator[Photo]:
    """Rows of Flickr8k."""
    flickr8k_shards()  # says so where they are missing
    (split,) = open_dataset(FLICKR8K).splits.values()
    for row in range(start, end):
        sample = split.read(row)
        jpeg = sample.medium("image")
        assert jpeg is not None
        yield Photo(jpeg, sample.meta["captions"])


def redone(jpeg: bytes, kind: str) -> bytes:
    """A photo that curation has to judge: stored anew, made small, or without any detail."""
    picture = Image.open(io.BytesIO(jpeg))
    if kind == "small":
        picture = picture.resize((48, 48))
    if kind == "blurred":
        picture = picture.filter(ImageFilter.GaussianBlur(12))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def hostile(jpeg: bytes) -> dict[str, Route]:
    """What must be rejected, by its kind."""
    return {
        "missing": status(404),
        "failing": status(503),
        "endless": endless,
        "silent": silent,
        "short": short(jpeg),
        "page": b"<html>no picture here",
        "empty": b"",
        "cut": jpeg[: len(jpeg) // 2],
        "bomb": _png_header(60_000, 60_000),
        "inside": redirect("http://127.0.0.2:8080/"),
        "metadata": redirect("http://169.254.169.254/latest/meta-data/"),
        "file": redirect("file:///etc/passwd"),
        "loop": redirect("loop.jpg"),
        "unwanted": wished(jpeg),
    }


def _png_header(width: int, height: int) -> bytes:
    """A PNG of one row that says it is very large."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def fill_web(web: Web, path: Path) -> None:
    """Serve the photos and what is wrong, and write a list of all as `path`."""
    rows: list[tuple[str, str, str, str]] = []

    def offer(name: str, route: Route, photo: Photo, licence: str = FREE, text: str = "") -> None:
        web.routes[f"/{name}.jpg"] = route
        captions = photo.captions
        german = captions.get("de", [""])[0]
        rows.append((web.url(f"/{name}.jpg"), text or captions["en"][0], german, licence))

    found = list(photos(0, NUM_WEB))
    kinds = list(hostile(found[0].jpeg).items()) * MISTAKES
    for number, photo in enumerate(found):
        jpeg = photo.jpeg
        licence = CLOSED if number % 30 == 7 else FREE
        text = SPAM if number % 60 == 11 else ""
        if number % 45 == 20:
            text = f"{photo.captions['en'][0]} Write to ada.lovelace{number}@example.org"
        route = slowly(jpeg, part_bytes=500) if number % 20 == 4 else jpeg
        offer(f"photo{number}", route, photo, licence, text)
        if number % 25 == 3:
            offer(f"same{number}", jpeg, photo)
        for kind, remainder in (("again", 13), ("small", 17), ("blurred", 29)):
            if number % 40 == remainder:
                offer(f"{kind}{number}", redone(jpeg, kind), photo)
        if number % 10 == 9 and kinds:
            kind, hostile_route = kinds.pop(0)
            offer(f"bad/{number}/{kind}", hostile_route, photo)
    for number, photo in enumerate(photos(*_evaluation_rows())):
        if number % 10 == 0:
            offer(f"leak{number}", redone(photo.jpeg, "again"), photo)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("URL", "caption_en", "caption_de", "licence"), *rows])


def _evaluation_rows() -> tuple[int, int]:
    return NUM_WEB + NUM_STORE, NUM_WEB + NUM_STORE + NUM_EVALUATION


def write_evaluation(folder: Path) -> None:
    """A folder of photos with captions beside them, some of which the web list has, too."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(photos(*_evaluation_rows())):
        (folder / f"{number:03d}.jpg").write_bytes(photo.jpeg)
        (folder / f"{number:03d}.txt").write_text("\n".join(photo.captions["en"]))


def fill_store(client: Any) -> None:
    """A bucket with a folder of photos and captions and with tars, something wrong in each."""
    client.create_bucket(Bucket="bucket")

    def put(key: str, data: bytes) -> None:
        client.put_object(Bucket="bucket", Key=key, Body=data)

    for number, photo in enumerate(photos(NUM_WEB, NUM_WEB + NUM_STORE)):
        put(f"photos/{number:03d}.jpg", photo.jpeg)
        put(f"photos/{number:03d}.txt", "\n".join(photo.captions["en"]).encode())
    for name, data in {"cut": photo.jpeg[:3000], "empty": b"", "page": b"<html>"}.items():
        put(f"photos/{name}.jpg", data)
        put(f"photos/{name}.txt", b"nothing to see")
    put("photos/alone.jpg", photo.jpeg)
    put("photos/words.txt", b"a text without a picture")
    put("tars/own.tar", flickr8k_shards()[2].read_bytes())
    put("tars/hostile.tar", _hostile_tar(photo))


def _hostile_tar(photo: Photo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes, **changes: Any) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in changes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))

        texts = json.dumps({"captions": photo.captions}).encode()
        for name in ("../../etc/passwd", "/absolute/key"):
            add(f"{name}.jpg", photo.jpeg)
            add(f"{name}.json", texts)
        add("link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("link.json", texts)
        add("nonsense.jpg", photo.jpeg)
        add("nonsense.json", b"{not json")
        add("sound.jpg", photo.jpeg)
        add("sound.json", texts)
    return buffer.getvalue()
