"""Plain WebDataset tars: what is a sample, what is refused, and the indexes in a cache."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.shards import SampleError, Split, open_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch unpickled",)


def plain_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def caption(text: str) -> bytes:
    return json.dumps({"captions": {"en": [text]}}).encode()


def _keys(split: Split) -> list[str]:
    return [split.read(row).key for row in range(len(split))]


def test_plain_tars_open_as_folder_file_brace_pattern_and_list(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    for number in range(3):
        members = [(f"s{number}.jpg", b"pixels"), (f"s{number}.json", caption(f"c{number}"))]
        plain_tar(folder / f"x-{number:03d}.tar", members)
    whole = open_dataset(folder)
    assert _keys(whole.splits["all"]) == ["s0", "s1", "s2"]
    pattern = open_dataset(f"{folder}/x-{{000..002}}.tar")
    assert pattern.fingerprint == whole.fingerprint
    listed = open_dataset([f"{folder}/x-{{002,000}}.tar"])
    assert _keys(listed.splits["all"]) == ["s2", "s0"]
    assert len(open_dataset(folder / "x-001.tar").splits["all"]) == 1


def test_a_plain_set_is_indexed_once_and_again_when_altered(tmp_path: Path) -> None:
    tar = plain_tar(tmp_path / "p" / "x.tar", [("a.jpg", b"1"), ("a.json", caption("one"))])
    entries = tmp_path / "cache" / "carillon" / "indexes"
    first = open_dataset(tar)
    open_dataset(tar)
    assert len(list(entries.iterdir())) == 1
    plain_tar(tar, [("b.jpg", b"2"), ("b.json", caption("two"))])
    os.utime(tar, ns=(1, 1))
    second = open_dataset(tar)
    assert second.splits["all"].key(0) == "b"
    assert second.fingerprint != first.fingerprint
    assert len(list(entries.iterdir())) == 2


def test_webdataset_conventions(tmp_path: Path) -> None:
    members = [
        ("d/a.frames.jpg", b"ignored"),
        ("d/a.JPG", b"upper"),
        ("d/a.json", b'{"caption": "one text", "more": 1}'),
        ("b.png", b"png"),
        ("b.txt", b"ein Text\n"),
        ("c.webp", b"webp"),
    ]
    split = open_dataset(plain_tar(tmp_path / "p" / "x.tar", members)).splits["all"]
    samples = [split.read(row) for row in range(len(split))]
    assert [sample.key for sample in samples] == ["d/a", "b", "c"]
    assert samples[0].medium("image") == b"upper"
    assert samples[0].meta["captions"] == {"und": ["one text"]}
    assert samples[1].meta == {"captions": {"und": ["ein Text"]}}
    assert samples[2].meta == {"captions": {}}


def test_a_text_counts_where_the_json_holds_no_caption(tmp_path: Path) -> None:
    """As img2dataset writes them: a picture, its caption as .txt, where it came from as .json."""
    members = []
    for key, described in {
        "a": b'{"url": "https://x.org/a.jpg", "width": 8}',
        "b": b'{"caption": null, "captions": {}}',
        "c": b'{"caption": "from json"}',
        "d": caption("from json"),
        "e": b"{broken",
    }.items():
        members += [(f"{key}.jpg", b"1"), (f"{key}.txt", b"from text"), (f"{key}.json", described)]
    members += [("f.jpg", b"1"), ("f.json", b'{"label": 3}')]
    split = open_dataset(plain_tar(tmp_path / "p" / "x.tar", members)).splits["all"]
    captions = [split.read(row).meta["captions"] for row in range(4)]
    assert captions[:2] == [{"und": ["from text"]}] * 2
    assert captions[2:] == [{"und": ["from json"]}, {"en": ["from json"]}]
    with pytest.raises(SampleError, match="JSON cannot be read"):
        split.read(4)
    assert split.read(5).meta == {"label": 3, "captions": {}}


@pytest.mark.parametrize(("end", "message"), [(1024, "damaged"), (2048, "overwritten with zeros")])
def test_a_tar_with_zeros_in_it_is_not_taken_as_shorter(
    tmp_path: Path, end: int, message: str
) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), *[(f"c{n}.jpg", bytes([n])) for n in range(20)]]
    tar = plain_tar(tmp_path / "p" / "x.tar", members)
    data = bytearray(tar.read_bytes())
    zeroed = 512 if message == "damaged" else len(data) - end
    data[end : end + zeroed] = bytes(zeroed)
    tar.write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.tar cannot be used: .*{message}.* byte {end:,}"):
        open_dataset(tar)


def test_hostile_members_are_ignored_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tar_path = tmp_path / "p" / "x.tar"
    members = [
        ("../x.jpg", b"1"),
        ("/abs.jpg", b"1"),
        ("a/../../b.jpg", b"1"),
        ("c:\\d.jpg", b"1"),
        ("good.jpg", b"pixels"),
        ("good.json", caption("fine")),
        ("good.pyd", pickle.dumps(Bomb())),
        ("good.pkl", pickle.dumps(Bomb())),
        ("good.pickle", pickle.dumps(Bomb())),
        ("good.npy", b"\x93NUMPY"),
    ]
    plain_tar(tar_path, members)
    with tarfile.open(tar_path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    dataset = open_dataset(tar_path)
    assert _keys(dataset.splits["all"]) == ["good"]
    assert dataset.manifest.ignored == {
        "unsafe name": 4,
        ".pyd": 1,
        ".pkl": 1,
        ".pickle": 1,
        ".npy": 1,
        "link or special file": 3,
    }
    assert not (tmp_path / "unpickled").exists()
    assert not list(tmp_path.rglob("*.jpg"))


def test_duplicate_keys_across_shards_are_refused(tmp_path: Path) -> None:
    plain_tar(tmp_path / "p" / "one.tar", [("a.jpg", b"1"), ("b.jpg", b"1")])
    plain_tar(tmp_path / "p" / "two.tar", [("b.jpg", b"2")])
    with pytest.raises(UserError, match=r"'b' occurs in one\.tar and again in two\.tar"):
        open_dataset(tmp_path / "p")
    assert not list((tmp_path / "cache" / "carillon" / "indexes").iterdir())


@pytest.mark.parametrize("keep", [100, 700, 1024, 1536, 2048])
def test_a_truncated_tar_is_named(tmp_path: Path, keep: int) -> None:
    tar = plain_tar(tmp_path / "p" / "x.tar", [("a.jpg", bytes(600)), ("a.json", caption("c"))])
    os.truncate(tar, keep)
    with pytest.raises(UserError, match=r"x\.tar cannot be used: truncated"):
        open_dataset(tar)


def test_a_damaged_header_in_the_middle_is_found(tmp_path: Path) -> None:
    tar = plain_tar(tmp_path / "p" / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    data = bytearray(tar.read_bytes())
    data[1024 + 3] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar cannot be used: damaged: .* byte 1,024"):
        open_dataset(tar)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ftp://host/x.tar", "ftp:// cannot be read"),
        ("missing", "does not exist"),
        ("x-{a..z}.tar", "no range like"),
        ([], "empty list"),
    ],
)
def test_what_cannot_be_opened_says_so(given: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(given)


def test_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither dataset\.json nor a \.tar"):
        open_dataset(tmp_path)


def test_a_sample_with_broken_json_is_named_and_the_next_one_is_read(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"),
        ("a.json", b"{broken"),
        ("b.jpg", b"1"),
        ("b.json", b"[" * 100_000),
        ("c.jpg", b"1"),
        ("c.json", b'{"captions": {"en": ["\\ud800"]}}'),
        ("d.jpg", b"1"),
        ("d.json", caption("fine")),
    ]
    split = open_dataset(plain_tar(tmp_path / "p" / "x.tar", members)).splits["all"]
    for row, reason in enumerate(["JSON cannot be read", "JSON is nested", "lone surrogate"]):
        with pytest.raises(SampleError, match=reason) as caught:
            split.read(row)
        assert caught.value.key == "abc"[row]
    assert split.read(3).meta["captions"] == {"en": ["fine"]}


def test_real_webdataset_shards_open(real_data: Callable[[str], Path]) -> None:
    split = open_dataset(real_data("flickr8k")).splits["all"]
    assert len(split) == 6473
    sample = split.read(0)
    assert sample.key == "2862509442_4f5dc96dca"
    assert len(sample.medium("image")) == 5523
    assert sorted(sample.meta["captions"]) == ["ar", "cs", "de", "en", "fr"]
