import runpy
import struct
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from carillon.engine.data.decode.frame_choice import (
    FramesAtRate,
    KeyFrames,
    Sampling,
    UniformFrames,
    chosen_frames,
)
from carillon.engine.data.decode.limits import Limits, VideoError
from carillon.engine.data.decode.video import decode_video
from carillon.engine.data.decode.video_track import runs, video_format

CLIPS = runpy.run_path(str(Path(__file__).with_name("clips.py")))
video, frame, sound_only = CLIPS["video"], CLIPS["frame"], CLIPS["sound_only"]
BOTH = pytest.mark.parametrize("container", ["mp4", "webm"])


@BOTH
@pytest.mark.parametrize("rate", [10, Fraction(30_000, 1001)])
def test_all_frames_and_their_times(container: str, rate: int | Fraction) -> None:
    data = video(container, rate=rate)
    clip = decode_video(data)
    assert video_format(data) == container
    assert clip.codec == {"mp4": "h264", "webm": "vp9"}[container]
    assert clip.frames.shape == (30, 48, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert np.allclose(clip.times_s, np.arange(30) / float(rate), atol=6e-4)  # WebM has whole ms
    assert clip.duration_s == pytest.approx(30 / float(rate), abs=2e-3)
    assert clip.frame_rate == pytest.approx(float(rate), rel=1e-3)
    expected = np.stack([frame(index) for index in range(30)]).astype(int)
    assert np.abs(clip.frames - expected).mean() < 3
    assert np.abs(clip.frames[:, 36, 48] - expected[:, 36, 48]).max() <= 4


@BOTH
@pytest.mark.parametrize(
    ("sampling", "window", "expected"),
    [
        (UniformFrames(3), (0.0, None), [5, 15, 25]),
        (UniformFrames(4), (1.0, 0.4), [10, 11, 12, 13]),
        (UniformFrames(9), (1.0, 0.4), [10, 11, 12, 13]),
        (FramesAtRate(2.0), (0.0, None), [0, 5, 10, 15, 20, 25]),
        (FramesAtRate(4.0), (0.0, 1.0), [0, 2, 5, 7]),
        (FramesAtRate(100.0), (2.7, None), [27, 28, 29]),
        (KeyFrames(), (0.0, None), [0, 10, 20]),
        (KeyFrames(), (0.5, 1.0), [10]),
        (None, (1.25, 0.3), [13, 14, 15]),
        (None, (2.85, 60.0), [29]),
    ],
)
def test_sampling_takes_frames_of_the_whole(
    container: str,
    sampling: Sampling | None,
    window: tuple[float, float | None],
    expected: list[int],
) -> None:
    data = video(container)
    whole = decode_video(data)
    part = decode_video(data, sampling, start_s=window[0], duration_s=window[1])
    assert np.array_equal(part.times_s, whole.times_s[expected])
    assert np.array_equal(part.frames, whole.frames[expected])
    assert (part.duration_s, part.frame_rate) == (whole.duration_s, whole.frame_rate)


def test_frames_at_a_rate_are_those_shown_then() -> None:
    """Of a video whose frames come when they like."""
    times = np.array([0.0, 0.1, 0.7, 0.8, 2.0])
    keys = np.ones(5, bool)
    assert chosen_frames(times, keys, FramesAtRate(2.0)).tolist() == [0, 1, 3, 4]
    assert chosen_frames(times, keys, FramesAtRate(2.0), 0.5, 1.0).tolist() == [2, 3]
    assert chosen_frames(times, keys, UniformFrames(2)).tolist() == [1, 3]
    assert chosen_frames(times, keys, KeyFrames(), 0.65, 0.1).tolist() == [2]
    assert chosen_frames(times, keys, UniformFrames(2), 3.0).tolist() == []


def test_only_what_leads_to_a_chosen_frame_is_decoded() -> None:
    keys = np.zeros(40, bool)
    keys[::10] = True
    assert runs(keys, np.array([5])) == [(0, 6)]
    assert runs(keys, np.array([35, 12, 10])) == [(10, 13), (30, 36)]
    assert runs(keys, np.array([9, 11])) == [(0, 12)]  # on in one go: nothing is skipped
    assert runs(np.zeros(4, bool), np.array([3])) == [(0, 4)]  # a file that has lost its first


@BOTH
def test_frames_are_scaled(container: str) -> None:
    data = video(container, num_frames=3)
    assert decode_video(data, size=24).frames.shape == (3, 24, 32, 3)
    assert decode_video(data, size=(20, 50)).frames.shape == (3, 20, 50, 3)
    assert decode_video(data, size=96).frames.shape == (3, 96, 128, 3)
    small = decode_video(data, size=(24, 32)).frames.astype(int)
    halved = decode_video(data).frames.reshape(3, 24, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(small - halved)[:, 2:-2, 2:-2].mean() < 3


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_video_is_shown_upright(degrees: int) -> None:
    """By the matrix in the track's header, as cameras write it."""
    data = bytearray(video(num_frames=2))
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    at = data.index(b"tkhd") + 4 + 40
    matrix = [cosine * 65536, sine * 65536, 0, -sine * 65536, cosine * 65536, 0, 0, 0, 2**30]
    data[at : at + 36] = struct.pack(">9i", *matrix)
    plain = decode_video(video(num_frames=2)).frames
    expected = np.rot90(plain, -degrees // 90, axes=(1, 2))
    turned = decode_video(bytes(data))
    assert np.array_equal(turned.frames, expected)
    shape = (2, 24, 16, 3)
    assert decode_video(bytes(data), size=(24, 16)).frames.shape == shape


def test_real_clips_decode(real_data: Callable[[str], Path]) -> None:
    with tarfile.open(min(real_data("grid_av").glob("*.tar"))) as tar:
        data = [tar.extractfile(m).read() for m in tar if m.name.endswith(".mp4")][:3]
    for clip in data:
        whole = decode_video(clip, size=48)
        assert len(whole.frames) == 75
        assert whole.duration_s == pytest.approx(3.0)
        eight = decode_video(clip, UniformFrames(8), size=48)
        assert np.array_equal(eight.frames, whole.frames[np.isin(whole.times_s, eight.times_s)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF\0\0\0\0AVI LIST",
        b"\x47" + bytes(187),
        b"#EXTM3U\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"FLV\1",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(VideoError, match="not an MP4 or WebM video"):
        decode_video(data)


def test_other_codecs_are_refused() -> None:
    with pytest.raises(VideoError, match="the video is mpeg4; h264 and vp9 are allowed"):
        decode_video(video("mp4", codec="mpeg4"))


@BOTH
def test_a_file_without_video_is_refused(container: str) -> None:
    with pytest.raises(VideoError, match="no video in it"):
        decode_video(sound_only(container))


def test_no_frames_are_refused() -> None:
    webm = video("webm")
    with pytest.raises(VideoError, match=r"no frames|cannot be decoded"):
        decode_video(webm[: webm.index(b"\x1f\x43\xb6\x75")])  # ends before its first cluster
    mp4 = bytearray(video("mp4"))
    for table in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"stss"):
        at = mp4.index(table) + (12 if table == b"stsz" else 8)
        mp4[at : at + 4] = bytes(4)  # no entries
    with pytest.raises(VideoError, match=r"no frames|cannot be decoded"):
        decode_video(bytes(mp4))


def test_a_forged_duration_changes_nothing() -> None:
    plain = decode_video(video("mp4"), UniformFrames(3))
    mp4 = bytearray(video("mp4"))
    for box in (b"mvhd", b"mdhd", b"tkhd"):
        at = mp4.index(box) + 4 + (20 if box == b"tkhd" else 16)
        mp4[at : at + 4] = b"\x7f\xff\xff\xff"
    forged = decode_video(bytes(mp4), UniformFrames(3))
    assert np.array_equal(forged.frames, plain.frames)
    assert (forged.duration_s, forged.frame_rate) == (plain.duration_s, plain.frame_rate)
    webm = bytearray(video("webm"))
    at = webm.index(b"\x44\x89\x88") + 3  # Duration, eight bytes
    webm[at : at + 8] = struct.pack(">d", 1e15)
    assert decode_video(bytes(webm)).duration_s == pytest.approx(3.0, abs=2e-3)


def test_a_huge_frame_rate_is_refused() -> None:
    mp4 = bytearray(video("mp4"))
    at = mp4.index(b"mdhd") + 4 + 12
    mp4[at : at + 4] = struct.pack(">I", 2**31 - 1)  # ticks a second
    with pytest.raises(VideoError, match=r"30 frames in .* at most 1000 a second"):
        decode_video(bytes(mp4))


def test_huge_frames_are_refused_before_they_are_decoded() -> None:
    limits = Limits(max_pixels=64 * 48 - 1)
    with pytest.raises(VideoError, match="64 x 48 pixels; at most 3,071"):
        decode_video(video("mp4"), limits=limits)
    with pytest.raises(VideoError, match="64 x 48 pixels; at most 3,071"):
        decode_video(video("webm"), limits=limits)


def test_limits_of_frames_and_bytes() -> None:
    data = video("mp4")
    with pytest.raises(VideoError, match="more than 29 frames"):
        decode_video(data, limits=Limits(max_frames=29))
    limits = Limits(max_decoded_bytes=100_000)
    with pytest.raises(VideoError, match="276,480 bytes; at most 100,000"):
        decode_video(data, limits=limits)
    assert len(decode_video(data, UniformFrames(8), limits=limits).frames) == 8
    with pytest.raises(VideoError, match="more than 0 s to decode"):
        decode_video(data, limits=Limits(max_decode_s=0))


@BOTH
def test_truncated_videos_are_refused_or_shorter(container: str) -> None:
    data = video(container)
    for share in (0.02, 0.5, 0.9):
        cut = data[: int(len(data) * share)]
        if container == "webm" and share > 0.02:  # a stream: it may end anywhere
            assert len(decode_video(cut).frames) < 30
        else:
            with pytest.raises(VideoError):
                decode_video(cut)


def test_a_video_that_is_cut_behind_its_header_is_refused(tmp_path: Path) -> None:
    front = video("mp4", path=tmp_path / "front.mp4")
    assert len(decode_video(front).frames) == 30
    with pytest.raises(VideoError, match=r"ends after .* of 30 frames|damaged or cut"):
        decode_video(front[: int(len(front) * 0.8)])


@pytest.mark.parametrize(
    ("option", "value"),
    [("start_s", -1.0), ("duration_s", 0.0), ("size", 0), ("size", (3, 0))],
)
def test_requests_that_make_no_sense_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}: "):
        decode_video(video(num_frames=1), **{option: value})


def test_a_window_past_the_end_is_refused() -> None:
    with pytest.raises(VideoError, match=r"no frame in the window from 3 s; the video has 30 fr"):
        decode_video(video(), start_s=3.0)
