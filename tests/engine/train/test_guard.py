import math

import pytest

from carillon.engine.train.guard import StepGuard, TrainingStopped
from carillon.engine.train.optim import GuardConfig


def settled(**config: float) -> StepGuard:
    guard = StepGuard(GuardConfig(**config))  # type: ignore[arg-type]
    for step in range(30):
        assert not guard.judge(3.0 - step / 100, 1.0).skip
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (2.7, math.nan, "gradient norm is nan"),
        (2.7, 1e20, "gradient norm 1e"),  # a flipped exponent bit
    ],
)
def test_bad_steps_are_skipped_with_a_reason(loss: float, norm: float, reason: str) -> None:
    verdict = settled().judge(loss, norm)
    assert verdict.skip
    assert verdict.reason is not None
    assert verdict.reason.startswith(reason)


def test_a_loss_spike_is_told_but_not_skipped() -> None:
    verdict = settled().judge(7.0, 1.0)
    assert not verdict.skip
    assert verdict.reason is not None
    assert "over twice its running mean" in verdict.reason


def test_ordinary_noise_passes() -> None:
    guard = settled()
    assert guard.judge(3.5, 8.0) == guard.judge(2.0, 0.1)
    assert guard.judge(2.0, 5.0).reason is None


def test_large_norms_pass_before_the_mean_is_known() -> None:
    guard = StepGuard(GuardConfig())
    assert not guard.judge(3.0, 1.0).skip
    assert not guard.judge(3.0, 1e6).skip


def test_too_many_skips_in_a_row_stop_the_run() -> None:
    guard = settled(max_skipped=3)
    for _ in range(3):
        guard.judge(math.nan, 1.0)
        guard.check()
    guard.judge(2.5, 1.0)  # a good step in between starts the count again
    for _ in range(4):
        guard.judge(math.nan, 1.0)
    with pytest.raises(TrainingStopped, match=r"4 steps in a row .*max_skipped=3"):
        guard.check()


def test_state_carries_everything() -> None:
    guard = settled()
    guard.judge(math.nan, 1.0)
    other = StepGuard(GuardConfig())
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    for loss, norm in ((2.6, 19.9), (2.6, 30.0), (9.0, 1.0)):
        assert other.judge(loss, norm) == guard.judge(loss, norm)


def test_skipping_is_told_until_a_good_step() -> None:
    guard = settled()
    assert not guard.is_skipping
    guard.judge(math.nan, 1.0)
    assert guard.is_skipping
    guard.judge(2.5, 1.0)
    assert not guard.is_skipping
