"""What happens to a step that went wrong: seen, logged, and handled by a stated policy.

- Loss or gradient norm not finite: the step is skipped, its samples' keys are logged.
- Gradient norm above `spike_factor` times its running mean (a flipped bit, a poisoned batch):
  skipped likewise, once 20 good steps have set the mean.
- Loss above twice its running mean: logged as a spike, not skipped.
- More than `max_skipped` skipped steps in a row: the run stops. Nothing is saved or evaluated while
  steps are being skipped, so the last checkpoint is from before them; a run whose last step was
  skipped is saved if that step's loss was finite, and given up otherwise.
The decision uses globally reduced numbers only, so every rank takes the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from carillon.engine.train.optim import GuardConfig

_WARMUP_STEPS = 20
_MEMORY = 0.98


class TrainingStopped(RuntimeError):
    """The guard gave the run up; exit code 3."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    skip: bool
    reason: str | None


class StepGuard:
    """Judges each step by its loss and gradient norm; part of the checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._seen = 0
        self._norm_mean = 0.0
        self._loss_mean = 0.0
        self._skipped_in_row = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Whether to skip this step, and why it is worth a log line (None: it is not)."""
        reason = self._reason_to_skip(loss, grad_norm)
        if reason is not None:
            self._skipped_in_row += 1
            return Verdict(skip=True, reason=reason)
        spike = self._seen >= _WARMUP_STEPS and loss > 2 * self._loss_mean
        self._remember(loss, grad_norm)
        mean = f"loss {loss:.4g} is over twice its running mean {self._loss_mean:.4g}"
        return Verdict(skip=False, reason=mean if spike else None)

    @property
    def is_skipping(self) -> bool:
        """Whether the last step was skipped."""
        return self._skipped_in_row > 0

    def check(self) -> None:
        """Raises TrainingStopped once too many steps in a row were skipped."""
        if self._skipped_in_row > self._config.max_skipped:
            raise TrainingStopped(
                f"{self._skipped_in_row} steps in a row were skipped "
                f"(optimization.guard.max_skipped={self._config.max_skipped}). The last checkpoint "
                "is from before them: the same command goes on from it. If it stops again, look "
                "at the samples in skipped_steps.jsonl, or train anew with a lower optimization.lr"
            )

    def _reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        limit = self._config.spike_factor * self._norm_mean
        if self._seen >= _WARMUP_STEPS and grad_norm > limit:
            return f"gradient norm {grad_norm:.4g} is over {limit:.4g}"
        return None

    def _remember(self, loss: float, grad_norm: float) -> None:
        self._skipped_in_row = 0
        memory = min(_MEMORY, self._seen / (self._seen + 1))
        self._norm_mean = memory * self._norm_mean + (1 - memory) * grad_norm
        self._loss_mean = memory * self._loss_mean + (1 - memory) * loss
        self._seen += 1

    def state_dict(self) -> dict[str, float]:
        return {
            "seen": self._seen,
            "norm_mean": self._norm_mean,
            "loss_mean": self._loss_mean,
            "skipped_in_row": self._skipped_in_row,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._seen, self._skipped_in_row = int(state["seen"]), int(state["skipped_in_row"])
        self._norm_mean, self._loss_mean = float(state["norm_mean"]), float(state["loss_mean"])
