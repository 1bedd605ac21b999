"""What the system says when a path cannot be read or written, as one line with what to do about it.

Only errors that the user can mend are explained: of a path (it is missing, forbidden, of the wrong
kind), or of a disk that is full or fails. Any other OSError is a fault of ours and keeps its
traceback.
"""

from __future__ import annotations

import errno
import os

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_RIGHTS = "give a path that you may use, or change its rights"
_ADVICE = dict.fromkeys(_DISK, "make room or write elsewhere, then give the same command again") | {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOENT: "check the path and the folders in it",
    errno.ENOTDIR: "a part of the path is a file; check it",
    errno.EEXIST: "a file stands where a folder is needed; give another path",
    errno.EISDIR: "give a file, not a folder",
    errno.ELOOP: "its links lead in a circle; give another path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EBUSY: "another program uses it; give another path",
    errno.EIO: "check the disk, or give another path",
    errno.ESTALE: "its disk was mounted anew; give the same command again",
}


def explained(error: OSError) -> str:
    """What is wrong in the system's words, and what to do where that is known."""
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    return f"{reason}; {advice}" if advice else reason


def refusal(error: OSError) -> str | None:
    """The one line for an error that the user can mend: path, reason, advice; None for others.

    Only a disk may fail without a path.
    """
    path = error.filename2 or error.filename  # a rename's second path is the one asked for
    if error.errno not in _ADVICE:
        return None
    if isinstance(path, (str, bytes, os.PathLike)):
        return f"{os.fsdecode(path)}: {explained(error)}"
    return explained(error) if error.errno in _DISK else None
