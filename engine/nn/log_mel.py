"""Log-mel spectrograms of sounds, computed where the sounds are: on the model's device.

A short-time Fourier transform with a Hann window, its power by triangular mel filters, and the
logarithm to base 10. Defaults are Whisper's: mels by Slaney's formula (linear to 1 kHz, then
logarithmic; O'Shaughnessy's, which HTK has, on request) and filters of equal area. Frame k is
centred on sample k * hop; before a sound's first sample it is continued by reflection, after its
last one by zeros, so that a sound has the same frames alone and padded in a batch. Computed in
float32 whatever autocast says. Left out: gradients of the filters, dither, pre-emphasis, a mean
over a corpus.

Legend: B batch, T samples, F frequencies, M mels, K frames.
Status: not run on a GPU yet; on a CPU in every test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

_POWER_FLOOR = 1e-10
_SLANEY_BREAK_HZ, _SLANEY_HZ_PER_MEL = 1000.0, 200.0 / 3
_SLANEY_LOG_STEP = math.log(6.4) / 27  # 27 mels from 1 to 6.4 kHz


@dataclass(frozen=True, kw_only=True)
class LogMelConfig:
    """What a spectrogram is like. `mel_scale` is slaney or htk; htk's filters all peak at 1."""

    rate: int = 16_000
    window: int = 400
    hop: int = 160
    num_mels: int = 80
    min_hz: float = 0.0
    max_hz: float | None = None  # none: half of the rate
    mel_scale: Literal["slaney", "htk"] = "slaney"
    dynamic_range: float | None = 8.0  # decades kept below a sound's loudest value; none: all

    def __post_init__(self) -> None:
        top = self.top_hz
        if not 0 <= self.min_hz < top <= self.rate / 2:
            raise ValueError(
                f"min_hz and max_hz: {self.min_hz:g} and {top:g} given; they must rise, from 0 to "
                f"half of the rate ({self.rate / 2:g})"
            )
        if min(self.window, self.hop, self.num_mels) < 1:
            raise ValueError("window, hop and num_mels: 1 or more is allowed")
        if self.mel_scale not in ("slaney", "htk"):
            raise ValueError(f"mel_scale: {self.mel_scale} given; slaney and htk are allowed")

    @property
    def top_hz(self) -> float:
        return self.rate / 2 if self.max_hz is None else self.max_hz


class LogMel(nn.Module):
    """Sounds of one rate to log-mel spectrograms, scaled to about [-1, 1] as Whisper's are.

    The scale is (log10 + 4) / 4, whatever the dynamic range. Deterministic on a CPU.
    """

    def __init__(self, config: LogMelConfig | None = None) -> None:
        super().__init__()
        self.config = config or LogMelConfig()
        window = torch.hann_window(self.config.window, dtype=torch.float64)
        self.register_buffer("_window", window.float(), persistent=False)
        self.register_buffer("_filters_FM", mel_filters(self.config).float(), persistent=False)

    def num_frames(self, lengths_B: Tensor) -> Tensor:
        """Frames of sounds of so many samples: one for each hop begun."""
        return (lengths_B + self.config.hop - 1) // self.config.hop

    def forward(self, sounds_BT: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Spectrograms (B, M, K), zero past a sound's own frames, and how many frames each has.

        Shapes: sounds (B, T), padded with anything; lengths (B,), none: all are T. Lengths on the
        CPU are checked without waiting for a device.
        Raises ValueError for other shapes, or a sound without samples or longer than T.
        """
        if sounds_BT.dim() != 2 or sounds_BT.shape[1] == 0:
            raise ValueError(f"sounds: the shape (B, T) is needed, got {tuple(sounds_BT.shape)}")
        batch, total = sounds_BT.shape
        if lengths_B is None:
            lengths_B = torch.full((batch,), total, device=sounds_BT.device)
        if lengths_B.shape != (batch,):
            raise ValueError(f"lengths: ({batch},) is needed, got {tuple(lengths_B.shape)}")
        if bool(((lengths_B < 1) | (lengths_B > total)).any()):
            raise ValueError(f"lengths: 1 to {total} samples are allowed, got {lengths_B.tolist()}")
        with torch.autocast(sounds_BT.device.type, enabled=False):
            return self._spectrograms(sounds_BT.float(), lengths_B.to(sounds_BT.device))

    def _spectrograms(self, sounds_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        num_frames_B = self.num_frames(lengths_B)
        frames = -(-sounds_BT.shape[1] // config.hop)
        power_BFK = self._power(_zero_past(sounds_BT, lengths_B), frames)
        filters_FM: Tensor = self.get_buffer("_filters_FM")
        mels_BMK = torch.einsum("bfk,fm->bmk", power_BFK, filters_FM)
        logs_BMK = mels_BMK.clamp(min=_POWER_FLOOR).log10()
        inside_B1K = torch.arange(frames, device=logs_BMK.device) < num_frames_B[:, None, None]
        if config.dynamic_range is not None:
            loudest_B11 = logs_BMK.masked_fill(~inside_B1K, -math.inf).amax((1, 2), keepdim=True)
            logs_BMK = torch.maximum(logs_BMK, loudest_B11 - config.dynamic_range)
        return ((logs_BMK + 4) / 4).masked_fill(~inside_B1K, 0.0), num_frames_B

    def _power(self, sounds_BT: Tensor, frames: int) -> Tensor:
        half, window = self.config.window // 2, self.get_buffer("_window")
        needed = (frames - 1) * self.config.hop + self.config.window - half
        needed = max(needed, sounds_BT.shape[1], half + 1)
        padded_BT = nn.functional.pad(sounds_BT, (0, needed - sounds_BT.shape[1]))
        whole_BT = torch.cat([padded_BT[:, 1 : half + 1].flip(1), padded_BT], dim=1)
        spectrum_BFK = torch.stft(
            whole_BT,
            self.config.window,
            self.config.hop,
            window=window,
            center=False,
            return_complex=True,
        )[..., :frames]
        return spectrum_BFK.real.square() + spectrum_BFK.imag.square()


def mel_filters(config: LogMelConfig) -> Tensor:
    """Triangles (F, M) float64 over the frequencies of the transform.

    Source: Slaney 1998, Auditory Toolbox (equal area), and Young et al., The HTK Book (peaks of 1).
    """
    bins = torch.arange(config.window // 2 + 1, dtype=torch.float64)
    frequencies_F = bins * config.rate / config.window
    lowest, highest = (_hz_to_mel(hz, config.mel_scale) for hz in (config.min_hz, config.top_hz))
    mels = torch.linspace(lowest, highest, config.num_mels + 2, dtype=torch.float64)
    corners = _mel_to_hz(mels, config.mel_scale)
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    rising_FM = (frequencies_F[:, None] - left) / (peak - left)
    falling_FM = (right - frequencies_F[:, None]) / (right - peak)
    filters_FM = torch.minimum(rising_FM, falling_FM).clamp(min=0)
    return filters_FM * (2 / (right - left)) if config.mel_scale == "slaney" else filters_FM


def _hz_to_mel(hz: float, scale: str) -> float:
    if scale == "htk":
        return 2595 * math.log10(1 + hz / 700)
    if hz < _SLANEY_BREAK_HZ:
        return hz / _SLANEY_HZ_PER_MEL
    return 15 + math.log(hz / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP


def _mel_to_hz(mels: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 700 * (10 ** (mels / 2595) - 1)
    logarithmic = _SLANEY_BREAK_HZ * torch.exp(_SLANEY_LOG_STEP * (mels - 15))
    return torch.where(mels < 15, mels * _SLANEY_HZ_PER_MEL, logarithmic)


def _zero_past(sounds_BT: Tensor, lengths_B: Tensor) -> Tensor:
    places_T = torch.arange(sounds_BT.shape[1], device=sounds_BT.device)
    return sounds_BT.masked_fill(places_T >= lengths_B[:, None], 0.0)
