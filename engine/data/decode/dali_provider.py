"""The provider `dali`: batches decoded by NVIDIA DALI's operators, on a CPU or a GPU.

Headers are checked here first, under the same limits as elsewhere, and frames are chosen by the
packets' times, so both providers refuse and choose alike. What DALI does not decode, or decodes by
another rule, goes to the provider `cpu`: pictures other than plain JPEGs (their transparency), MP3,
sounds that do not know their length. One bad sample ends a batch in DALI, which does not say which
it was; its samples are then decoded one by one. On a CPU DALI has no decoder for H.264.

Status: the CPU operators run in tests; the GPU pipelines (device="mixed") have not run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carillon.engine.config import UserError
from carillon.engine.data.decode.audio import audio_header
from carillon.engine.data.decode.frame_choice import Sampling
from carillon.engine.data.decode.jpeg import is_plain_jpeg
from carillon.engine.data.decode.limits import (
    AudioError,
    Deadline,
    DecodeError,
    Limits,
    VideoError,
    check_decoded_bytes,
)
from carillon.engine.data.decode.provider import CpuDecoder, Results
from carillon.engine.data.decode.video_track import opened_video, read_track

_SOUND_FORMATS = ("wav", "flac", "ogg")


class DaliDecoder:
    """DALI's operators as a decoder of batches; pipelines are made when they are first needed.

    Raises UserError where DALI is not installed.
    """

    def __init__(self, device: torch.device, limits: Limits) -> None:
        self._dali = _imported()
        self._device, self._limits = device, limits
        self._on_gpu = device.type == "cuda"
        self._pipelines: dict[tuple[Any, ...], Any] = {}

    @cached_property
    def _cpu(self) -> CpuDecoder:
        return CpuDecoder(self._limits)

    def pictures(self, batch: Sequence[bytes], *, size: tuple[int, int]) -> Results:
        def accepts(data: bytes) -> bool:
            return is_plain_jpeg(data, max_pixels=self._limits.max_pixels)

        def graph(data: Any) -> Any:
            fn, types = self._dali.fn, self._dali.types
            pixels = fn.decoders.image(data, device=self._mixed, output_type=types.RGB)
            return fn.resize(
                pixels, size=list(size), interp_type=types.INTERP_CUBIC, antialias=True
            )

        return self._decode(
            batch,
            accepts,
            lambda samples: self._run(("pictures", size), graph, [samples]),
            lambda samples: self._cpu.pictures(samples, size=size),
        )

    def sounds(self, batch: Sequence[bytes], *, rate: int) -> Results:
        def accepts(data: bytes) -> bool:
            header = audio_header(data, limits=self._limits)
            if header.num_frames == 0:
                raise AudioError("the sound has no samples")
            seconds = (header.num_frames or 0) / header.rate
            check_decoded_bytes(AudioError, "the sound", round(4 * seconds * rate), self._limits)
            return header.format in _SOUND_FORMATS and header.num_frames is not None

        def graph(data: Any) -> Any:
            samples, _ = self._dali.fn.decoders.audio(data, downmix=True, sample_rate=rate)
            return samples.gpu() if self._on_gpu else samples

        def run(samples: Sequence[bytes]) -> Results:
            sounds = self._run(("sounds", rate), graph, [samples])
            return [_finite(sound) for sound in sounds]

        return self._decode(batch, accepts, run, lambda s: self._cpu.sounds(s, rate=rate))

    def clips(
        self, batch: Sequence[bytes], sampling: Sampling, *, size: tuple[int, int]
    ) -> Results:
        chosen: dict[bytes, NDArray[np.int32]] = {}

        def accepts(data: bytes) -> bool:
            chosen[data] = self._chosen_frames(data, sampling, size)
            return True

        def graph(data: Any, frames: Any) -> Any:
            fn, types = self._dali.fn, self._dali.types
            clips = fn.decoders.video(data, device=self._mixed, frames=frames)
            return fn.resize(
                clips, size=list(size), interp_type=types.INTERP_TRIANGULAR, antialias=True
            )

        def run(samples: Sequence[bytes]) -> Results:
            given = [samples, [chosen[data] for data in samples]]
            return self._run(("clips", size), graph, given)

        return self._decode(batch, accepts, run, lambda s: self._cpu.clips(s, sampling, size=size))

    @property
    def _mixed(self) -> str:
        return "mixed" if self._on_gpu else "cpu"

    def _chosen_frames(
        self, data: bytes, sampling: Sampling, size: tuple[int, int]
    ) -> NDArray[np.int32]:
        """The chosen frames' places among those shown, in the order of their times."""
        deadline = Deadline(VideoError, "the video", self._limits)
        with opened_video(data, self._limits) as (container, stream):
            codec = stream.codec_context.name
            track = read_track(container, stream, self._limits, deadline)
        if codec == "h264" and not self._on_gpu:
            raise VideoError(
                "the video is H.264, which DALI decodes on a GPU only (on a CPU VP8, VP9 and "
                "MJPEG): take the decoders of `cpu`"
            )
        places = track.choose(sampling, 0.0, None)
        check_decoded_bytes(
            VideoError, "the video", len(places) * 3 * size[0] * size[1], self._limits
        )
        rising = np.sort(track.times_s[track.shown])
        return np.searchsorted(rising, track.times_s[places]).astype(np.int32)

    def _decode(
        self,
        batch: Sequence[bytes],
        accepts: Callable[[bytes], bool],
        by_dali: Callable[[Sequence[bytes]], Results],
        by_cpu: Callable[[Sequence[bytes]], Results],
    ) -> Results:
        """Each sample by DALI where it can be, else by the CPU's decoders, else its error."""
        results: Results = [DecodeError("not decoded")] * len(batch)
        ours: list[int] = []
        theirs: list[int] = []
        for place, data in enumerate(batch):
            try:
                (theirs if accepts(data) else ours).append(place)
            except DecodeError as error:
                results[place] = error
        for place, result in zip(ours, by_cpu([batch[at] for at in ours]), strict=True):
            results[place] = self._moved(result)
        decoded = self._together_or_singly([batch[at] for at in theirs], by_dali, by_cpu)
        for place, result in zip(theirs, decoded, strict=True):
            results[place] = result
        return results

    def _moved(self, result: Tensor | DecodeError) -> Tensor | DecodeError:
        return result.to(self._device) if isinstance(result, Tensor) else result

    def _together_or_singly(
        self,
        samples: Sequence[bytes],
        by_dali: Callable[[Sequence[bytes]], Results],
        by_cpu: Callable[[Sequence[bytes]], Results],
    ) -> Results:
        if not samples:
            return []
        try:
            return by_dali(samples)
        except RuntimeError as error:  # of one of them, and the message does not name it
            self._pipelines.clear()  # a pipeline is of no use after an error
            if len(samples) > 1:
                return [self._together_or_singly([s], by_dali, by_cpu)[0] for s in samples]
            (result,) = by_cpu(samples)  # for its message
            reason = str(error).strip().splitlines()
            return [
                result
                if isinstance(result, DecodeError)
                else DecodeError(f"DALI cannot decode it: {reason[0] if reason else error!r}")
            ]

    def _run(
        self, key: tuple[Any, ...], graph: Callable[..., Any], inputs: Sequence[Sequence[Any]]
    ) -> Results:
        num_samples = len(inputs[0])
        pipeline = self._pipelines.get(key)
        if pipeline is None or pipeline.max_batch_size < num_samples:
            pipeline = self._pipelines[key] = self._pipeline(graph, len(inputs), num_samples)
        for number, samples in enumerate(inputs):
            arrays = [
                np.frombuffer(sample, np.uint8) if isinstance(sample, bytes) else sample
                for sample in samples
            ]
            pipeline.feed_input(f"input{number}", arrays)
        (out,) = pipeline.run()
        if self._on_gpu:
            return [
                torch.utils.dlpack.from_dlpack(out[place]).clone() for place in range(num_samples)
            ]
        return [torch.from_numpy(np.array(out.at(place))) for place in range(num_samples)]

    def _pipeline(self, graph: Callable[..., Any], num_inputs: int, batch_size: int) -> Any:
        pipeline = self._dali.Pipeline(
            batch_size=batch_size,
            num_threads=torch.get_num_threads(),
            device_id=(self._device.index or 0) if self._on_gpu else None,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            inputs = [
                self._dali.fn.external_source(name=f"input{number}") for number in range(num_inputs)
            ]
            pipeline.set_outputs(graph(*inputs))
        pipeline.build()
        return pipeline


def _finite(sound: Tensor | DecodeError) -> Tensor | DecodeError:
    if isinstance(sound, Tensor) and not bool(torch.isfinite(sound).all()):
        return AudioError("the sound has samples that are no finite numbers")
    return sound


def _imported() -> Any:
    try:
        for part in ("fn", "types"):
            import_module(f"nvidia.dali.{part}")
        return import_module("nvidia.dali")
    except ImportError:
        raise UserError(
            "the decoders of `dali` need NVIDIA DALI: pip install 'carillon-engine[dali]' "
            "(Linux on x86-64, CUDA 13; its CPU operators need no GPU)"
        ) from None
