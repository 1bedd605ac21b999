import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from carillon.engine.config import UserError, build
from carillon.engine.parallel.collectives import clip_gradients_, gradient_norm
from carillon.engine.train.optim import (
    NamedAdamW,
    OptimizationConfig,
    WeightAverage,
    learning_rate,
)


def test_the_schedule_warms_up_and_follows_a_cosine() -> None:
    config = OptimizationConfig(lr=2.0, warmup_steps=4, steps=104, min_lr_share=0.1)
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[54] == pytest.approx(0.2 + 1.8 / 2)
    assert rates[104] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[4:]))
    flat = OptimizationConfig(lr=2.0, schedule="constant", steps=9)
    assert {learning_rate(flat, step, 9) for step in range(9)} == {2.0}


def test_epochs_become_steps() -> None:
    assert OptimizationConfig(epochs=3).num_steps(1000, 64) == 47
    assert OptimizationConfig(epochs=0.001).num_steps(1000, 64) == 1
    assert OptimizationConfig(steps=9).num_steps(1000, 64) == 9


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_updates_equal_the_published_rule_and_spare_gains_and_biases() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64 by hand."""
    config = OptimizationConfig(steps=9, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-8)
    model = small()
    plain = frozenset(name for name, p in model.named_parameters() if p.ndim < 2)
    optimizer = NamedAdamW(model, config, plain)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        rate = 0.1 / step
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient, (m, v) = parameter.grad.double(), moments[name]
            m.mul_(0.8).add_(0.2 * gradient)
            v.mul_(0.9).add_(0.1 * gradient**2)
            if name not in plain:
                expected[name] *= 1 - rate * 0.5
            corrected = (v / (1 - 0.9**step)).sqrt() + 1e-8
            expected[name] -= rate * (m / (1 - 0.8**step)) / corrected
        optimizer.step(rate)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], rtol=1e-5, atol=1e-6), name


def test_state_is_named_and_complete_before_the_first_step() -> None:
    model = small()
    optimizer = NamedAdamW(model, OptimizationConfig(steps=1), frozenset())
    tensors = optimizer.state_tensors()
    assert set(tensors) == {
        f"{name}.{part}"
        for name, _ in model.named_parameters()
        for part in ("exp_avg", "exp_avg_sq", "step")
    }
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    assert optimizer.state_tensors()["0.weight.step"].item() == 1
    assert optimizer.state_tensors()["0.weight.exp_avg"].abs().min() > 0


def test_the_average_forgets_at_its_rate() -> None:
    model = small()
    average = WeightAverage(model, 0.9)
    before = model[0].weight.detach().clone()  # type: ignore[index]
    with torch.no_grad():
        model[0].weight.add_(1.0)  # type: ignore[index]
    for _ in range(3):
        average.update(model)
    expected = before + 1 - 0.9**3
    assert torch.allclose(average.tensors["0.weight"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either steps or epochs"),
        ({"steps": 5, "epochs": 1}, "give either steps or epochs"),
        ({"steps": 5, "betas": [0.9]}, "1 values given, 2 are needed"),
        ({"steps": 5, "warmup_steps": 6}, "6 is more than steps"),
        ({"steps": 5, "optimizer": "sgd"}, "allowed: adamw"),
        ({"steps": 0}, "at least 1 is allowed"),
        ({"steps": 5, "lr": math.nan}, "a finite number is needed"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(OptimizationConfig, values)


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"steps": 10**19}, 10**9),
        ({"steps": 5, "warmup_steps": 10**19}, 10**9),
        ({"epochs": 1e300}, 10**6),
    ],
)
def test_lengths_beyond_any_run_are_refused(values: dict[str, float], limit: int) -> None:
    with pytest.raises(UserError, match=f"at most {limit} is allowed"):
        build(OptimizationConfig, values)


@pytest.mark.parametrize("limit", [0.5, 1e3, math.inf])
def test_gradients_are_clipped_as_torch_clips_them(limit: float) -> None:
    ours, theirs = (nn.Linear(3, 4), nn.Linear(3, 4))
    for model in (ours, theirs):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 2.0 + i)
    norm = gradient_norm(ours.parameters())
    assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    clip_gradients_(ours.parameters(), limit, norm)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert (gradient_norm(ours.parameters()) < norm) == (limit < norm)
