"""What was erased is refused by key and by bytes, and is not told by the file."""

import hashlib
import json
from pathlib import Path

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.items import media_sha256
from carillon.engine.data.shards import SampleError, ShardWriter, open_dataset
from carillon.engine.data.tombstones import (
    NO_MEDIA_SHA256,
    TOMBSTONES_NAME,
    Tombstones,
    tombstones_of,
)

MEMBERS = {"jpg": b"a face"}


def erased(before: Tombstones, fingerprint: str, *items: tuple[str, str]) -> Tombstones:
    return before.with_erasure(
        dataset="photos",
        fingerprint=fingerprint,
        erased_at="2026-01-02T03:04:05+00:00",
        reason="request 17",
        requested_by="the subject",
        items=items,
    )


@pytest.fixture
def tombstones() -> Tombstones:
    return erased(Tombstones(), "f1", ("jane-doe", media_sha256(MEMBERS)))


def test_refused_by_key_or_by_bytes(tombstones: Tombstones) -> None:
    expected = "it was erased from photos on 2026-01-02 and must not come back"
    assert tombstones.refusal_of("jane-doe", {"jpg": b"other"}) == expected
    assert tombstones.refusal_of("x", MEMBERS) == expected
    assert tombstones.refusal_of("x", {"jpg": b"other"}) is None
    assert Tombstones().refusal_of("jane-doe", MEMBERS) is None


def test_an_item_without_media_is_known_by_its_key_alone() -> None:
    tombstones = erased(Tombstones(), "f", ("t", media_sha256({})))
    assert media_sha256({}) == NO_MEDIA_SHA256
    assert tombstones.refusal_of("t", {}) is not None
    assert tombstones.refusal_of("another text", {}) is None


def test_the_file_goes_on_and_holds_no_content(tombstones: Tombstones, tmp_path: Path) -> None:
    later = erased(tombstones, "f2", ("john", "ab"))
    other = erased(Tombstones(), "f3", ("eve", "cd"))
    for name, one in (("a", later), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / TOMBSTONES_NAME).write_bytes(one.content())
    (tmp_path / "none").mkdir()
    found = tombstones_of([tmp_path / name for name in ("a", "b", "none", "a")])
    assert len(found) == 3
    for key in ("jane-doe", "john", "eve"):
        assert found.refusal(key, "x") is not None
    text = later.content().decode()
    assert "request 17" in text
    for content in ("jane", "john", media_sha256(MEMBERS), hashlib.sha256(b"john").hexdigest()):
        assert content not in text
    assert len({one.salt for one in later.erasures}) == 1  # one hash an item, however many erasures


@pytest.mark.parametrize("change", ["flip", "cut", "newer", "list"])
def test_a_damaged_file_stops_everything(
    tombstones: Tombstones, tmp_path: Path, change: str
) -> None:
    content = tombstones.content()
    if change == "newer":
        said = json.loads(content)
        del said["checksum"]
        said["version"] = 2
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
        content = json.dumps(said | {"checksum": hashlib.sha256(canonical).hexdigest()}).encode()
    path = tmp_path / TOMBSTONES_NAME
    changed = {"flip": content.replace(b"2026", b"2027"), "cut": content[:-20], "list": b"[]"}
    path.write_bytes(changed.get(change, content))
    with pytest.raises(UserError, match="of version 2" if change == "newer" else "is damaged"):
        tombstones_of([tmp_path])


def test_a_writer_refuses_what_was_erased_from_what_it_is_made_of(
    tombstones: Tombstones, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "old", name="old", source={}) as writer:
        writer.write("x", {"png": b"1"}, {})
        writer.attach(TOMBSTONES_NAME, tombstones.content())
    for out, how in (("new", {"parents": [tmp_path / "old"]}), ("old", {"overwrite": True})):
        with ShardWriter(tmp_path / out, name=out, source={}, **how) as writer:  # type: ignore[arg-type]
            writer.write("fine", {"png": b"2"}, {})
            with pytest.raises(SampleError, match=r"erased from .* and must not come back"):
                writer.write("jane-doe", {"png": b"3"}, {})
            with pytest.raises(SampleError, match=r"erased from .* and must not come back"):
                writer.write("another-key", MEMBERS, {})
        assert tombstones_of([tmp_path / out]).erasures == tombstones.erasures
        assert len(open_dataset(tmp_path / out).splits["train"]) == 1
