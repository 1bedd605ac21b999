"""Decoding in a process of its own, for a sample that a worker may not survive.

Decoders are C: on hostile bytes one may crash, or hang where no Python runs to notice. A sample
that was being decoded when its worker died or stalled is tried once more here, under limits of
memory, processor time and time; whatever happens becomes a DecodeError. It costs half a second,
most of it for imports, so it is for suspects and not for every sample. The child gets the bytes and
gives arrays back by files in memory whose size is limited; nothing that it wrote is unpickled.
Left out: a sandbox of system calls.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from carillon.engine.data.decode import frame_choice
from carillon.engine.data.decode.audio import Sound, decode_audio
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.decode.limits import (
    DEFAULT_LIMITS,
    AudioError,
    DecodeError,
    ImageError,
    Limits,
    VideoError,
)
from carillon.engine.data.decode.video import Clip, decode_video

_DECODERS: dict[str, tuple[Callable[..., Any], type[DecodeError]]] = {
    "image": (decode_image, ImageError),
    "audio": (decode_audio, AudioError),
    "video": (decode_video, VideoError),
}
_RESULTS = {"Sound": Sound, "Clip": Clip}
_SAMPLINGS = ("EveryFrame", "UniformFrames", "FramesAtRate", "KeyFrames")


def decode_guarded(
    modality: str,
    data: bytes,
    *,
    timeout_s: float = 90.0,
    memory_bytes: int = 4 * 2**30,
    **options: Any,
) -> Any:
    """What decode_image, decode_audio or decode_video gives for these bytes and options.

    Raises the modality's DecodeError, also for a crash, a hang, or too much memory.
    """
    _, error = _DECODERS[modality]
    request = {"modality": modality, "memory_bytes": memory_bytes, "timeout_s": timeout_s}
    head = json.dumps(request | {"options": _as_values(options)}).encode()
    with _memory_file(len(head).to_bytes(8, "big") + head + data) as given, _memory_file() as out:
        command = [sys.executable, "-m", __spec__.name, str(out)]
        try:
            ended = subprocess.run(
                command,
                stdin=given,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(out,),
                timeout=timeout_s,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise error(f"its decoder took more than {timeout_s:g} s and was stopped") from None
        if ended.returncode:
            raise error(f"its decoder {_how_it_ended(ended.returncode)}")
        with open(out, "rb", closefd=False) as written:
            written.seek(0)  # the child's place in the file is ours
            return _result(written.read(), error)


def _as_values(options: dict[str, Any]) -> dict[str, Any]:
    values = dict(options)
    if values.get("sampling") is not None:
        sampling = values["sampling"]
        values["sampling"] = [type(sampling).__name__, asdict(sampling)]
    if "limits" in values:
        values["limits"] = asdict(values["limits"])
    return values


def _from_values(values: dict[str, Any]) -> dict[str, Any]:
    options = dict(values)
    if options.get("sampling") is not None:
        name, fields = options["sampling"]
        assert name in _SAMPLINGS
        options["sampling"] = getattr(frame_choice, name)(**fields)
    if "limits" in options:
        options["limits"] = Limits(**options["limits"])
    if isinstance(options.get("size"), list):
        options["size"] = tuple(options["size"])
    return options


@contextmanager
def _memory_file(content: bytes = b"") -> Iterator[int]:
    descriptor = os.memfd_create("carillon-decode")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "took too much processor time and was stopped"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended with code {code}: out of memory, most likely"


def _result(written: bytes, error: type[DecodeError]) -> Any:
    size = int.from_bytes(written[:8], "big")
    head = json.loads(written[8 : 8 + size])
    if "error" in head:
        raise error(head["error"])
    stream = io.BytesIO(written[8 + size :])
    arrays = [np.load(stream, allow_pickle=False) for _ in range(head["num_arrays"])]
    if head["result"] is None:
        return arrays[0]
    fields = [arrays[value[0]] if isinstance(value, list) else value for value in head["fields"]]
    return _RESULTS[head["result"]](*fields)


def _answer(result: Any) -> bytes:
    """A head in JSON, in which [n] stands for the n-th of the arrays that follow."""
    fields = list(result) if isinstance(result, tuple) else [result]
    stream, num_arrays = io.BytesIO(), 0
    for place, value in enumerate(fields):
        if isinstance(value, np.ndarray):
            np.save(stream, value, allow_pickle=False)
            fields[place] = [num_arrays]
            num_arrays += 1
    name = type(result).__name__ if isinstance(result, tuple) else None
    head = json.dumps({"result": name, "fields": fields, "num_arrays": num_arrays}).encode()
    return len(head).to_bytes(8, "big") + head + stream.getvalue()


def _serve(descriptor: int) -> None:
    """The child: one request from stdin, one answer to the descriptor."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    request = json.loads(sys.stdin.buffer.read(size))
    options = _from_values(request["options"])
    limits = options.get("limits", DEFAULT_LIMITS)
    _limit(request["memory_bytes"], request["timeout_s"], limits)
    data = sys.stdin.buffer.read()
    try:
        answer = _answer(_DECODERS[request["modality"]][0](data, **options))
    except ValueError as error:
        head = json.dumps({"error": str(error)}).encode()
        answer = len(head).to_bytes(8, "big") + head
    with open(descriptor, "wb") as out:
        out.write(answer)


def _limit(memory_bytes: int, timeout_s: float, limits: Limits) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, int(timeout_s) + 1),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits.max_decoded_bytes + 2**20),
    ):
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
