"""The next-token loss against torch's own in float64, whole and in shares of a batch."""

import pytest
import torch
import torch.nn.functional as F

from carillon.engine.data.packed_rows import IGNORED, next_tokens, positions
from carillon.engine.losses.language import counted, language_loss


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 700, 17, generator=generator) * 4  # more tokens than a chunk
    labels = torch.randint(0, 17, (3, 700), generator=generator)
    labels[torch.rand(3, 700, generator=generator) < 0.2] = IGNORED
    return logits.requires_grad_(), labels


def test_loss_and_gradient_are_the_mean_over_labels(
    case: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, labels = case
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss = language_loss(logits, labels, num_tokens=counted(labels))
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-9)


def test_shares_with_different_numbers_of_labels_average_to_the_whole(
    case: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, labels = case
    labels[0] = IGNORED  # one share has none
    num_tokens = counted(labels)
    whole = language_loss(logits, labels, num_tokens=num_tokens)
    shares = [
        language_loss(x, own, num_tokens=num_tokens, num_processes=3)
        for x, own in zip(logits.split(1), labels.split(1), strict=True)
    ]
    assert float(shares[0].detach()) == 0
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_no_label_at_all_is_a_loss_of_zero() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    labels = torch.full((1, 4), IGNORED)
    loss = language_loss(logits, labels, num_tokens=counted(labels))
    (grad,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0
    assert not grad.any()


def test_bfloat16_logits_are_summed_in_float32(
    case: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, labels = case
    rounded = logits.detach().bfloat16()
    loss = language_loss(rounded, labels, num_tokens=counted(labels))
    exact = language_loss(rounded.float(), labels, num_tokens=counted(labels))
    assert loss.dtype is torch.float32
    assert float(loss.detach()) == float(exact.detach())


def test_positions_and_labels_follow_from_the_starts() -> None:
    offsets = torch.tensor([[0, 3, 4, 6, 6], [0, 6, 6, 6, 6]], dtype=torch.int32)
    tokens = torch.arange(12, dtype=torch.int32).view(2, 6)
    assert positions(offsets, 6).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    x = IGNORED
    assert next_tokens(tokens, offsets).tolist() == [[1, 2, x, x, 5, x], [7, 8, 9, 10, 11, x]]
