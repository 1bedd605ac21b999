"""AdamW over named groups, the learning-rate schedule, and an exponential moving average.

The learning rate is a function of the step, so the schedule has no state. Gains, biases and the
logit scale are not decayed (Radford et al. 2021, section 2.5). Moments are saved under parameter
names, so they load into any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from carillon.engine.config import changed, section, setting
from carillon.engine.parallel.collectives import by_mesh

# Times the largest batch this stays far inside the int64 of positions.
MAX_STEPS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """`optimization.guard`: what happens to a step that went wrong."""

    spike_factor: float = setting(
        20.0, "A gradient norm this many times the running mean skips its step.", min=2
    )
    max_skipped: int = setting(
        10, "Stop after so many skipped steps in a row.", min=1, max=1_000_000
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """`optimization`: the optimizer, its schedule and how long to train."""

    optimizer: Literal["adamw"] = setting("adamw", "The optimizer.")
    lr: float = setting(1e-3, "Peak learning rate.", min=0)
    betas: tuple[float, ...] = setting((0.9, 0.98), "Decay of the moments.", min=0, max=0.99999)
    eps: float = setting(1e-6, "Added to the root of the second moment.", min=1e-16)
    weight_decay: float = setting(0.2, "Decoupled weight decay of matrices.", min=0)
    schedule: Literal["cosine", "constant"] = setting("cosine", "After the warm-up.")
    warmup_steps: int = setting(0, "Steps of linear warm-up.", min=0, max=MAX_STEPS)
    min_lr_share: float = setting(0.0, "The cosine ends at this share of lr.", min=0, max=1)
    epochs: float | None = setting(
        None, "Passes over the training rows; or give steps.", min=0, max=1_000_000
    )
    steps: int | None = setting(None, "Optimizer steps; or give epochs.", min=1, max=MAX_STEPS)
    clip_norm: float = setting(1.0, "Largest global gradient norm; 0 does not clip.", min=0)
    ema_decay: float | None = setting(
        None, "Keep an exponential moving average of the weights and evaluate it.", min=0, max=1
    )
    guard: GuardConfig = section(GuardConfig)

    def check(self) -> Iterator[str]:
        if (self.epochs is None) == (self.steps is None):
            yield "steps: give either steps or epochs"
        if len(self.betas) != 2:
            yield f"betas: {len(self.betas)} values given, 2 are needed"
        if self.epochs is not None and self.epochs <= 0:
            yield f"epochs: {self.epochs:g} trains nothing; give more than 0"
        if self.ema_decay == 1:
            yield "ema_decay: 1 never moves the average; give less, such as 0.999, or none"
        if self.schedule == "constant" and changed(self, "min_lr_share"):
            yield "min_lr_share: a constant schedule has no end to come down to; drop it"
        if self.steps is not None and self.warmup_steps > self.steps:
            yield f"warmup_steps: {self.warmup_steps} is more than steps ({self.steps})"

    def num_steps(self, num_samples: int, batch_size: int) -> int:
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0) * num_samples / batch_size))


def learning_rate(config: OptimizationConfig, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of `num_steps`.

    Source: Loshchilov and Hutter 2017 (SGDR), equation 5, one cycle, after a linear warm-up.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * cosine)


class NamedAdamW:
    """torch's fused AdamW over a module's named parameters, with a flat dict of tensors as
    state."""

    def __init__(
        self, model: nn.Module, config: OptimizationConfig, no_decay: frozenset[str]
    ) -> None:
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = [p for name, p in self._names.items() if name not in no_decay]
        others = [p for name, p in self._names.items() if name in no_decay]
        groups = [
            {"params": params, "weight_decay": decay}
            for named, decay in ((decayed, config.weight_decay), (others, 0.0))
            for params in by_mesh(named)
        ]
        beta1, beta2 = config.betas
        self._torch = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(beta1, beta2),
            eps=config.eps,
            fused=True,
        )

    def step(self, lr: float) -> None:
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()

    def zero_grad(self) -> None:
        self._torch.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`name.exp_avg`, `name.exp_avg_sq` and `name.step`; made (zeros) before the first step."""
        result: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            state = self._torch.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            result |= {f"{name}.{key}": value for key, value in state.items()}
        return result


class WeightAverage:
    """An exponential moving average of a module's parameters, laid out as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.tensors[name].lerp_(parameter.detach(), 1 - self.decay)
