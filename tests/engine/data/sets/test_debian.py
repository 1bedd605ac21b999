import os
from collections.abc import Callable
from pathlib import Path

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.sets.debian import fetch_packages

WriteDeb = Callable[..., Path]
FILES = {"usr/share/x/one.txt": b"one", "usr/share/x/two.txt": b"two" * 5000}


def test_files_of_a_package_are_read_by_name(write_deb: WriteDeb) -> None:
    folder = write_deb("x-data", FILES, version="1:2.0-1")
    package = fetch_packages(["x-data"], folder)["x-data"]
    assert package.spec == "debian:x-data=1:2.0-1"
    assert set(package.members) == set(FILES)
    assert {name: package.read(name) for name in FILES} == FILES
    assert package.of(["usr/share/x/one.txt"]).members.keys() == {"usr/share/x/one.txt"}
    with pytest.raises(UserError, match=r"x-data 1:2\.0-1 has no file usr/share/x/three\.txt"):
        package.read("usr/share/x/three.txt")
    with pytest.raises(UserError, match=r"two\.txt of x-data has more than"):
        package.read("usr/share/x/two.txt", max_bytes=100)


def test_links_and_paths_that_lead_out_write_nothing(write_deb: WriteDeb, tmp_path: Path) -> None:
    outside = {"../../outside.txt": b"out", "/absolute.txt": b"out"}
    folder = write_deb("x-data", FILES | outside, links={"usr/share/x/link": "/etc/passwd"})
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    package = fetch_packages(["x-data"], folder)["x-data"]
    assert set(package.members) >= set(FILES)
    assert "usr/share/x/link" not in package.members
    with pytest.raises(UserError, match="has no file usr/share/x/link"):
        package.read("usr/share/x/link")
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent for path in written} == {tmp_path / "cache" / "carillon" / "debian"}


def test_a_folder_without_the_package_says_how_to_get_it(write_deb: WriteDeb) -> None:
    folder = write_deb("x-data", FILES)
    with pytest.raises(UserError, match=r"lacks y-data\. Run `apt-get download y-data` in that"):
        fetch_packages(["x-data", "y-data"], folder)


def test_two_versions_are_one_too_many(write_deb: WriteDeb) -> None:
    write_deb("x-data", FILES)
    folder = write_deb("x-data", FILES, version="2.0-1")
    with pytest.raises(UserError, match=r"must hold one file of the package x-data; it has x-data"):
        fetch_packages(["x-data"], folder)


def test_a_damaged_package_is_one_message_and_leaves_nothing(
    write_deb: WriteDeb, tmp_path: Path
) -> None:
    folder = write_deb("x-data", FILES)
    (path,) = folder.glob("*.deb")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"dpkg-deb failed|cannot be read"):
        fetch_packages(["x-data"], folder)
    assert list((tmp_path / "cache").rglob("*.tar*")) == []


def test_what_was_unpacked_is_checked_when_it_is_used_again(
    write_deb: WriteDeb, tmp_path: Path
) -> None:
    folder = write_deb("x-data", FILES)
    package = fetch_packages(["x-data"], folder)["x-data"]
    content = bytearray(package.tar.read_bytes())
    content[content.index(b"one", 512)] ^= 1
    package.tar.write_bytes(content)
    with pytest.raises(UserError, match="was damaged after it was written"):
        fetch_packages(["x-data"], folder)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that copies from the test's folder and writes down what it was asked."""
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nshift 2\n'
        f'for name; do cp {tmp_path}/debs/"$name"_*.deb . || exit 1; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def test_packages_are_fetched_once(write_deb: WriteDeb, apt: Path, tmp_path: Path) -> None:
    write_deb("x-data", FILES)
    write_deb("y-data", FILES)
    first = fetch_packages(["x-data", "y-data"], None)
    assert fetch_packages(["x-data", "y-data"], None) == first
    assert (tmp_path / "calls").read_text() == "-qq download x-data y-data\n"
    (cached,) = (tmp_path / "cache" / "carillon" / "debian").glob("x-data*.deb")
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(UserError, match="is not what was fetched"):
        fetch_packages(["x-data"], None)


def test_a_failed_fetch_says_why_and_leaves_nothing(
    write_deb: WriteDeb, apt: Path, tmp_path: Path
) -> None:
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    with pytest.raises(UserError, match=r"apt-get failed \(100\): E: Unable.*--data"):
        fetch_packages(["x-data"], None)
    assert list((tmp_path / "cache").rglob("*.deb")) == []


def test_without_apt_the_way_out_is_said(
    write_deb: WriteDeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get was not found.*download x-data`.*--data"):
        fetch_packages(["x-data"], None)
