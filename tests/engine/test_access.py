"""Errors of the system: which the user can mend, and how they are told."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from carillon.engine.access import explained, refusal


def raised(work: Callable[..., object], *arguments: object) -> OSError:
    try:
        work(*arguments)
    except OSError as error:
        return error
    pytest.fail("no error")


def test_a_path_is_named_with_the_reason_and_what_to_do(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    told = refusal(raised(absent.read_bytes))
    assert told == f"{absent}: No such file or directory; check the path and the folders in it"
    assert refusal(raised(os.listdir, os.fsencode(absent))) == told
    assert refusal(raised(tmp_path.read_bytes)) == (
        f"{tmp_path}: Is a directory; give a file, not a folder"
    )


def test_of_a_rename_the_new_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "partial").write_text("")
    new = tmp_path / "absent" / "new"
    assert str(refusal(raised((tmp_path / "partial").rename, new))).startswith(f"{new}: No such")


def test_only_a_disk_may_fail_without_a_path() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert str(refusal(full)).startswith("No space left on device; make room")
    assert refusal(OSError(errno.EACCES, "Permission denied")) is None
    assert refusal(OSError("without a number")) is None


def test_what_no_advice_is_known_for_is_the_systems_word() -> None:
    assert explained(OSError(errno.EBADF, "Bad file descriptor")) == "Bad file descriptor"
    assert explained(OSError("only words")) == "only words"
