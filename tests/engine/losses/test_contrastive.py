import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.engine.config import UserError, build
from carillon.engine.losses.contrastive import (
    ContrastiveConfig,
    ContrastiveObjective,
    LossConfig,
    sigmoid_contrastive,
    softmax_contrastive,
)
from carillon.engine.models.towers.dual_encoder import DualFeatures


def features(n: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> DualFeatures:
    generator = torch.Generator().manual_seed(n)
    image, text = (
        F.normalize(torch.randn(n, 7, generator=generator, dtype=torch.float64), dim=1).to(dtype)
        for _ in range(2)
    )
    return DualFeatures(
        image=image.requires_grad_(),
        text=text.requires_grad_(),
        scale=torch.tensor([9.0], dtype=dtype).requires_grad_(),
        bias=torch.tensor([-4.0], dtype=dtype).requires_grad_() if bias else None,
    )


def plain_softmax(x: DualFeatures) -> Tensor:
    """The two directions written out, pair by pair."""
    n = len(x.image)
    total = torch.zeros((), dtype=x.image.dtype)
    for i in range(n):
        rows = torch.stack([x.scale[0] * x.image[i] @ x.text[j] for j in range(n)])
        columns = torch.stack([x.scale[0] * x.image[j] @ x.text[i] for j in range(n)])
        total = total - torch.log_softmax(rows, 0)[i] / 2 - torch.log_softmax(columns, 0)[i] / 2
    return total / n


def plain_sigmoid(x: DualFeatures) -> Tensor:
    n = len(x.image)
    assert x.bias is not None
    total = torch.zeros((), dtype=x.image.dtype)
    for i in range(n):
        for j in range(n):
            logit = x.scale[0] * x.image[i] @ x.text[j] + x.bias[0]
            total = total - F.logsigmoid(logit if i == j else -logit)
    return total / n


@pytest.mark.parametrize("n", [1, 2, 5, 13])
@pytest.mark.parametrize(
    ("loss", "plain"),
    [(softmax_contrastive, plain_softmax), (sigmoid_contrastive, plain_sigmoid)],
)
def test_losses_and_gradients_equal_their_definitions(n: int, loss: object, plain: object) -> None:
    reference = features(n)
    expected = plain(reference)  # type: ignore[operator]
    expected.backward()
    given = features(n, torch.float32)
    actual = loss(given, None)  # type: ignore[operator]
    actual.backward()
    assert actual.item() == pytest.approx(expected.item(), rel=2e-6)  # fp32, sums of 13 terms
    for ours, theirs in zip(given, reference, strict=True):
        if theirs.grad is not None:  # softmax does not use the bias
            assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize(
    ("loss", "plain"),
    [(softmax_contrastive, plain_softmax), (sigmoid_contrastive, plain_sigmoid)],
)
def test_in_bf16_only_the_features_and_their_gradients_are_rounded(
    loss: object, plain: object, exchange: str
) -> None:
    """The loss is that of rounded features; a gradient, its weights and itself have 8 bits each."""
    given, rounded = features(13, torch.float32), features(13)
    for side in (rounded.image, rounded.text):
        side.data = side.data.to(torch.bfloat16).double()
    expected = plain(rounded)  # type: ignore[operator]
    expected.backward()
    actual = loss(given, None, precision="bf16", exchange=exchange)  # type: ignore[operator]
    actual.backward()
    assert actual.item() == pytest.approx(expected.item(), rel=2e-6)
    for ours, theirs in ((given.image, rounded.image), (given.text, rounded.text)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype is torch.float32
        bound = 2.0**-7 * float(theirs.grad.abs().max())
        assert float((ours.grad.double() - theirs.grad).abs().max()) <= bound


def test_matched_pairs_lower_the_loss_and_a_permutation_raises_it() -> None:
    x = features(8, torch.float32)
    same = DualFeatures(x.image, x.image, x.scale, x.bias)
    rolled = DualFeatures(x.image, x.image.roll(1, 0), x.scale, x.bias)
    for loss in (softmax_contrastive, sigmoid_contrastive):
        assert loss(same, None) < loss(x, None) < loss(rolled, None)


def test_equal_features_give_the_loss_of_a_guess() -> None:
    x = DualFeatures(*[torch.ones(6, 4) / 2] * 2, scale=torch.tensor([3.0]), bias=None)
    assert softmax_contrastive(x, None).item() == pytest.approx(math.log(6), rel=1e-6)


def test_weights_scale_the_objective() -> None:
    x = features(5, torch.float32)
    single = ContrastiveObjective(ContrastiveConfig())(x, None)
    assert ContrastiveObjective(ContrastiveConfig(weight=2.5))(x, None) == 2.5 * single
    sigmoid = ContrastiveObjective(ContrastiveConfig(kind="sigmoid"))(x, None)
    assert sigmoid == sigmoid_contrastive(x, None)
    with pytest.raises(ValueError, match="built with a bias"):
        sigmoid_contrastive(features(5, bias=False), None)


def test_settings_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"label_smoothing: 0\.1 given, but only kind=softmax"):
        build(LossConfig, {"itc": {"kind": "sigmoid", "label_smoothing": 0.1}})
    with pytest.raises(UserError, match="same_field: empty; name a field"):
        build(LossConfig, {"itc": {"same_field": ""}})


def test_the_objective_takes_its_settings() -> None:
    x, ids = features(5, torch.float32), torch.tensor([3, 3, -1, -1, 4])
    for settings in (
        {"label_smoothing": 0.2, "exchange": "ring"},
        {"precision": "bf16"},
        {"kind": "sigmoid", "exchange": "ring"},
    ):
        config = build(ContrastiveConfig, settings)
        loss = sigmoid_contrastive if config.kind == "sigmoid" else softmax_contrastive
        how = {key: value for key, value in settings.items() if key != "kind"}
        expected = loss(x, None, ids, **how)  # type: ignore[operator]
        assert ContrastiveObjective(config)(x, None, ids) == expected
        assert expected != loss(x, None, None, **how)  # type: ignore[operator]


def test_what_comes_later_says_so() -> None:
    with pytest.raises(UserError, match=r"itm.weight: 0\.5 given; image-text matching comes with"):
        build(LossConfig, {"itm": {"weight": 0.5}})
    with pytest.raises(UserError, match="leaves nothing to train"):
        build(LossConfig, {"itc": {"weight": 0}})
