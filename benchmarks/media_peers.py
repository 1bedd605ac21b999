"""Sound and video by the libraries used directly: soundfile, PyAV, torchcodec, OpenCV, DALI.

Each is set to one thread and to what its documentation shows for a whole file in memory. DALI gets
batches, which it is made for. A library that lacks a codec is left out of its case.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import soundfile
import torch
from PIL import Image
from record import SHARED_DATA

from carillon.engine.data.decode.audio import decode_audio
from carillon.engine.data.decode.video import decode_video

SOUND_CODECS = {
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
VIDEO_CASES = ("h264 176x140", "h264 256x256", "vp9 256x256")
_NUM_CLIPS = 8


def enlarged(shard: Path, out: Path, side: int, num_pictures: int) -> Path:
    """A tar of the first samples of another, their photos enlarged to a square."""
    with tarfile.open(shard) as source, tarfile.open(out, "w") as target:
        for member in islice_members(source, 2 * num_pictures):
            data = source.extractfile(member).read()
            if member.name.endswith(".jpg"):
                picture = Image.open(io.BytesIO(data)).resize(
                    (side, side), Image.Resampling.BICUBIC
                )
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG", quality=88)
                data = buffer.getvalue()
            entry = tarfile.TarInfo(member.name)
            entry.size = len(data)
            target.addfile(entry, io.BytesIO(data))
    return out


def islice_members(source: tarfile.TarFile, most: int) -> Iterator[tarfile.TarInfo]:
    for number, member in enumerate(source):
        if number == most:
            return
        yield member


def _members(name: str, suffix: str) -> list[bytes]:
    found = []
    for shard in sorted((SHARED_DATA / name).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(suffix):
                    found.append(tar.extractfile(member).read())
                if len(found) == 2 * _NUM_CLIPS:
                    return found
    return found


def sounds(codec: str) -> tuple[list[bytes], float]:
    """Files, and their seconds of sound in all."""
    form, subtype = SOUND_CODECS[codec]
    files, seconds = [], 0.0
    for flac in _members("esc10", ".flac"):
        samples, rate = soundfile.read(io.BytesIO(flac))
        seconds += len(samples) / rate
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
        files.append(buffer.getvalue())
    return files, seconds


def _each(decode: Callable[[bytes], Any], files: Sequence[bytes]) -> Callable[[], Any]:
    def run() -> None:
        for data in files:  # a result is dropped at once, as by who copies it into a batch
            decode(data)

    return run


def sound_sides(codec: str, files: Sequence[bytes]) -> dict[str, Callable[[], Any]]:
    from torchcodec.decoders import AudioDecoder

    def by_soundfile(data: bytes) -> Any:
        return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)

    def by_pyav(data: bytes) -> Any:
        with av.open(io.BytesIO(data)) as container:
            frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        return np.concatenate(frames, axis=1)

    sides = {
        "carillon": _each(lambda data: decode_audio(data).samples, files),
        "soundfile": _each(by_soundfile, files),
        "pyav": _each(by_pyav, files),
        "torchcodec": _each(lambda data: AudioDecoder(data).get_all_samples().data, files),
    }
    if codec != "mp3":
        sides["dali"] = _dali(files, lambda fn, data: fn.decoders.audio(data)[0])
    return sides


def videos(case: str) -> tuple[list[bytes], int]:
    """Files, and their frames in all. Those of 256 px are GRID's, enlarged and encoded anew."""
    files = _members("grid_av", ".mp4")[:_NUM_CLIPS]
    if "256" in case:
        files = [_encoded(data, case) for data in files]
    return files, sum(len(decode_video(data).frames) for data in files)


def _encoded(data: bytes, case: str) -> bytes:
    container, codec = ("mp4", "libx264") if case.startswith("h264") else ("webm", "libvpx-vp9")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, 25)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23"} if codec == "libx264" else {"crf": "32", "b": "0"}
        for frame in decode_video(data, size=(256, 256)).frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return buffer.getvalue()


def video_sides(case: str, files: Sequence[bytes]) -> Mapping[str, Callable[[], Any]]:
    from torchcodec.decoders import VideoDecoder

    cv2.setNumThreads(1)

    def by_pyav(data: bytes) -> Any:
        with av.open(io.BytesIO(data)) as container:
            container.streams.video[0].thread_count = 1
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])

    def by_torchcodec(data: bytes) -> Any:
        decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1)
        return decoder.get_frames_in_range(0, len(decoder)).data

    def by_opencv(data: bytes) -> Any:
        capture = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        frames = []
        while (read := capture.read())[0]:
            frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
        return np.stack(frames)

    sides = {
        "carillon": _each(lambda data: decode_video(data).frames, files),
        "pyav": _each(by_pyav, files),
        "torchcodec": _each(by_torchcodec, files),
        "opencv": _each(by_opencv, files),
    }
    if case.startswith("vp9"):
        sides["dali"] = _dali(files, lambda fn, data: fn.decoders.video(data, device="cpu"))
    return sides


def _dali(files: Sequence[bytes], decode: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(
        batch_size=len(files), num_threads=1, device_id=None, prefetch_queue_depth=1
    )
    with pipeline:
        pipeline.set_outputs(decode(fn, fn.external_source(name="files")))
    pipeline.build()
    arrays = [np.frombuffer(data, np.uint8) for data in files]

    def run() -> Any:
        pipeline.feed_input("files", arrays)
        (out,) = pipeline.run()
        for place in range(len(files)):
            torch.from_numpy(np.array(out.at(place)))

    return run
