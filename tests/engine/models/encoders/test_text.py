"""The text transformer: pools, padding invariance, causal order, init."""

import pytest
import torch
from torch import Tensor

from carillon.engine.models.encoders.text import TextConfig, TextPool, TextTransformer

# fp32 sums of at most 96 terms of size 1 through 2 blocks.
FP32 = 1e-5
LENGTHS = torch.tensor([9, 2, 5])


def built(*, causal: bool = True, pool: TextPool = "eot") -> TextTransformer:
    config = TextConfig(
        width=24, depth=2, num_heads=3, mlp_width=96, context=12, causal=causal, pool=pool
    )
    model = TextTransformer(config, vocab_size=50)
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():  # at their initial 0.01 positions would hide a wrong slice
        model.position.mul_(50)
    return model


def captions(*, length: int = 9, filler: int = 0) -> Tensor:
    tokens = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.full((3, length), filler)
    padded[:, :9] = torch.where(torch.arange(9) < LENGTHS[:, None], tokens, filler)
    return padded


def plain_text(model: TextTransformer, tokens: Tensor, length: int) -> Tensor:
    """One caption alone, cut to its own tokens, through every block in full."""
    x = model.token(tokens[None, :length]) + model.position[:length]
    for block in model.transformer.blocks:
        x = block(x)
    x = model.post_norm(x)[0]
    return {"eot": x[length - 1], "first": x[0], "mean": x.mean(0)}[model.config.pool]


@pytest.mark.parametrize(
    ("causal", "pool"),
    [(True, "eot"), (True, "mean"), (False, "eot"), (False, "mean"), (False, "first")],
)
def test_batch_equals_each_caption_alone(causal: bool, pool: TextPool) -> None:
    model = built(causal=causal, pool=pool)
    tokens = captions()
    got = model(tokens, LENGTHS)
    want = torch.stack(
        [plain_text(model, row, int(size)) for row, size in zip(tokens, LENGTHS, strict=True)]
    )
    assert (got - want).abs().max() < FP32
    # Weighted: a plain sum of a normalised vector is constant, its gradient nothing but rounding.
    weights = torch.linspace(-1, 1, 24)
    wanted = torch.autograd.grad((want * weights).sum(), list(model.parameters()))
    found = torch.autograd.grad((got * weights).sum(), list(model.parameters()))
    total = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    for left, right in zip(found, wanted, strict=True):
        assert (left - right).norm() < FP32 * max(right.norm(), 1e-3 * total)


@pytest.mark.parametrize(("causal", "pool"), [(True, "eot"), (False, "mean"), (False, "first")])
def test_padding_changes_nothing(causal: bool, pool: TextPool) -> None:
    model = built(causal=causal, pool=pool)
    short, long = captions(), captions(length=12, filler=7)
    assert (model(short, LENGTHS) - model(long, LENGTHS)).abs().max() < FP32


def test_causal_text_sees_nothing_ahead_and_bidirectional_does() -> None:
    changed = captions()
    changed[0, 8] = changed[0, 8] % 49 + 1
    shorter = torch.tensor([8, 2, 5])
    causal = built()
    assert torch.equal(causal(captions(), shorter), causal(changed, shorter))
    both = built(causal=False, pool="first")
    assert (both(captions(), LENGTHS)[0] - both(changed, LENGTHS)[0]).abs().max() > 1e-3


def test_initial_statistics_are_the_published_ones() -> None:
    config = TextConfig(width=128, depth=1, num_heads=2, mlp_width=512)
    model = TextTransformer(config, vocab_size=1000)
    model.init_weights(torch.Generator().manual_seed(3))
    # 128,000 and 9,856 draws: within 4 % of the deviation (5 sigma).
    assert model.token.weight.std().item() == pytest.approx(0.02, rel=0.04)
    assert model.position.std().item() == pytest.approx(0.01, rel=0.04)


def test_too_long_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="length 13 given; this model takes at most 12"):
        built()(captions(length=13), LENGTHS)


def test_check_names_what_does_not_fit() -> None:
    config = TextConfig(width=100, depth=1, num_heads=3, mlp_width=400, pool="first")
    first, second = config.check()
    assert first == "width 100 is not a multiple of num_heads 3"
    assert "causal" in second
