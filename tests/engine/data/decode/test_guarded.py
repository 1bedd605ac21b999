import io
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from carillon.engine.data.decode import guarded
from carillon.engine.data.decode.audio import decode_audio
from carillon.engine.data.decode.frame_choice import UniformFrames
from carillon.engine.data.decode.guarded import decode_guarded
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.decode.limits import AudioError, ImageError, Limits, VideoError
from carillon.engine.data.decode.video import decode_video

CLIPS = runpy.run_path(str(Path(__file__).with_name("clips.py")))


def picture() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def test_the_result_is_that_of_decoding_here() -> None:
    assert np.array_equal(decode_guarded("image", picture()), decode_image(picture()))
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-1, 1, 8000), 8000, format="FLAC")
    ours = decode_guarded("audio", buffer.getvalue(), rate=16_000, start_s=0.5)
    expected = decode_audio(buffer.getvalue(), rate=16_000, start_s=0.5)
    assert np.array_equal(ours.samples, expected.samples)
    assert ours[1:] == expected[1:]
    data = CLIPS["video"]("mp4")
    options = {"sampling": UniformFrames(4), "size": (12, 16), "limits": Limits(max_frames=30)}
    clip, expected = decode_guarded("video", data, **options), decode_video(data, **options)
    assert np.array_equal(clip.frames, expected.frames)
    assert np.array_equal(clip.times_s, expected.times_s)
    assert clip[2:] == expected[2:]


def test_errors_come_back_as_they_are() -> None:
    with pytest.raises(ImageError, match="50 x 40 pixels; at most 7"):
        decode_guarded("image", picture(), max_pixels=7)
    with pytest.raises(AudioError, match="not a WAV"):
        decode_guarded("audio", b"nothing")
    with pytest.raises(VideoError, match="not an MP4"):
        decode_guarded("video", b"nothing")


@pytest.mark.parametrize(
    ("deed", "timeout_s", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 90, r"its decoder crashed \(SIGSEGV\)"),
        ("signal.pause()", 2, "its decoder took more than 2 s and was stopped"),
        ("bytearray(2**33)", 90, "its decoder ended with code 1: out of memory"),
    ],
)
def test_crashes_hangs_and_greed_end_there(
    deed: str, timeout_s: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a child whose picture decoder does the deed, as a library in C would."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, signal, sys\n"
        "from carillon.engine.data.decode import guarded\n"
        f"guarded._DECODERS['image'] = (lambda data: {deed}, None)\n"
        "guarded._serve(int(sys.argv[1]))\n"
    )
    run = subprocess.run

    def run_child(command: list[str], **options: object) -> object:
        return run([sys.executable, str(child), command[-1]], **options)

    monkeypatch.setattr(guarded.subprocess, "run", run_child)
    with pytest.raises(ImageError, match=message):
        decode_guarded("image", picture(), timeout_s=timeout_s)
