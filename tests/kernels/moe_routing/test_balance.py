"""The balancing loss and the bias rule, against sums written out."""

import pytest
import torch

from carillon.kernels.moe_routing.balance import load_balancing_loss, updated_selection_bias


def test_loss_is_switch_equation_4() -> None:
    means = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    counts = torch.tensor([6, 0, 2], dtype=torch.int32)
    loss = load_balancing_loss(means, counts)
    assert loss.item() == pytest.approx(3 * (0.75 * 0.5 + 0.25 * 0.2))
    loss.backward()
    assert means.grad is not None
    torch.testing.assert_close(means.grad, 3 * torch.tensor([0.75, 0.0, 0.25]))


def test_even_load_gives_one_whatever_k() -> None:
    for k in (1, 2, 4):
        counts = torch.full((4,), 10 * k, dtype=torch.int32)
        assert load_balancing_loss(torch.full((4,), 0.25), counts).item() == pytest.approx(1)


def test_no_slots_cost_nothing() -> None:
    assert load_balancing_loss(torch.zeros(3), torch.zeros(3, dtype=torch.int32)).item() == 0


def test_bias_falls_for_busy_experts_and_rises_for_idle_ones() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.1])
    counts = torch.tensor([9, 3, 0, 4], dtype=torch.int32)  # the mean is 4
    new = updated_selection_bias(bias, counts, 0.001)
    torch.testing.assert_close(new, torch.tensor([0.499, 0.001, -0.499, 0.1]))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both have the shape \(E,\), got \(3,\) and \(2,\)"):
        load_balancing_loss(torch.zeros(2), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="must both have the shape"):
        updated_selection_bias(torch.zeros(2), torch.zeros(2, 1, dtype=torch.int32), 0.1)
