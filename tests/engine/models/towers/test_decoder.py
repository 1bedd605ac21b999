"""The decoder against itself written out in float64; what a batch may be cut into; refusals."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from carillon.engine.config import UserError
from carillon.engine.data.packed_rows import IGNORED, next_tokens, positions
from carillon.engine.losses.language import counted, language_loss
from carillon.engine.models.towers.decoder import Decoder, build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig, MoeConfig
from carillon.engine.parallel.parity import TOLERANCE_FP32, gradient_errors

plain = runpy.run_path(str(Path(__file__).with_name("plain_decoder.py")))
VOCABULARY, LENGTH = 61, 24
OFFSETS = torch.tensor(
    [[0, 5, 24, 24, 24], [0, 24, 24, 24, 24], [0, 8, 9, 16, 24], [0, 1, 2, 23, 24]],
    dtype=torch.int32,
)
SMALL = DecoderConfig(
    width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_width=40, context=LENGTH, rope_base=100.0
)
MIXED = replace(
    SMALL, depth=3, moe=MoeConfig(num_experts=6, k=2, expert_width=24, z_loss=0.02, dense_blocks=1)
)
SIGMOID = MoeConfig(
    num_experts=8,
    k=3,
    expert_width=16,
    shared_experts=2,
    score="sigmoid",
    scale=1.5,
    balance_loss=0.03,
    bias_speed=0.1,
    capacity_factor=1.1,
)
CONFIGS = {
    "dense": replace(SMALL, qk_norm=True),
    "softmax": MIXED,
    "one expert a token": replace(MIXED, moe=replace(MIXED.moe, k=1, renormalize=False)),
    "sigmoid, bias, capacity, shared": replace(SMALL, moe=SIGMOID),
}


def built(config: DecoderConfig) -> Decoder:
    """Weights large enough that routers prefer experts and attention prefers tokens."""
    generator = torch.Generator().manual_seed(5)
    model = build_decoder(config, vocab_size=VOCABULARY, generator=generator)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.mul_(1.0 if "norm" in name else 8.0)
        for router in model.routers():
            if router.bias is not None:
                router.bias.copy_(torch.randn(router.bias.shape, generator=generator) / 20)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCABULARY, (len(OFFSETS), LENGTH), generator=generator)
    return tokens, positions(OFFSETS, LENGTH), OFFSETS


def step(model: Decoder, rows: int = len(OFFSETS)) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the batch, `rows` at a time."""
    whole = batch()
    labels = next_tokens(whole[0], whole[2])
    model.set_batch_share(rows / len(OFFSETS))
    loss = 0.0
    for *part, own in zip(*(x.split(rows) for x in (*whole, labels)), strict=True):
        share = language_loss(model(*part), own, num_tokens=counted(labels))
        torch.autograd.backward(share)
        loss += float(share.detach())
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_is_what_is_written_out(name: str) -> None:
    config, model = CONFIGS[name], built(CONFIGS[name])
    loss, gradients = step(model)
    weights = {
        name: value.double().requires_grad_(value.is_floating_point())
        for name, value in model.state_dict().items()
    }
    tokens, _, offsets = batch()
    logits, auxiliary = plain["run"](config, weights, tokens, offsets)
    labels = next_tokens(tokens, offsets)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )
    torch.autograd.backward(expected + auxiliary)
    assert loss == pytest.approx(float(expected.detach()), rel=TOLERANCE_FP32)
    reference = {name: weights[name].grad for name in gradients}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    errors = gradient_errors(gradients, reference)
    assert max(errors.values()) < TOLERANCE_FP32, max(errors, key=errors.__getitem__)
    for router in model.routers():
        if config.moe.capacity_factor is not None:
            assert 0 < router.tallied().dropped < router.tallied().slots.sum() / 2


@pytest.mark.parametrize("name", CONFIGS)
def test_microbatches_and_recompute_change_nothing(name: str) -> None:
    reference_loss, reference = step(built(CONFIGS[name]))
    tallies = []
    for rows, recompute in ((1, False), (2, True), (4, True)):
        model = built(CONFIGS[name])
        model.set_recompute(recompute)
        loss, gradients = step(model, rows)
        assert loss == pytest.approx(reference_loss, rel=TOLERANCE_FP32)
        assert max(gradient_errors(gradients, reference).values()) < TOLERANCE_FP32
        tallies.append([router.tally for router in model.routers()])
    for tally in tallies:
        torch.testing.assert_close(tally, tallies[0])


def test_a_document_sees_itself_alone() -> None:
    model = built(replace(MIXED, moe=replace(MIXED.moe, balance_loss=0.0)))
    tokens, _, _ = batch()
    with torch.no_grad():
        whole = model(*batch())
        one = torch.tensor([[0, 7]], dtype=torch.int32)
        alone = model(tokens[2:3, 9:16], torch.arange(7)[None], one)
    torch.testing.assert_close(alone[0], whole[2, 9:16])


def test_the_bias_moves_against_the_load_and_is_saved() -> None:
    model = built(CONFIGS["sigmoid, bias, capacity, shared"])
    step(model)
    router = next(model.routers())
    assert router.bias is not None
    before, slots = router.bias.clone(), router.tallied().slots
    router.balance_(slots)
    expected = before - 0.1 * torch.sign(slots - slots.mean()).float()
    torch.testing.assert_close(router.bias, expected)
    names = set(model.state_dict())
    assert "blocks.0.mlp.router.bias" in names
    assert not [name for name in names if "tally" in name]


def test_evaluation_is_not_tallied() -> None:
    model = built(MIXED)
    with torch.no_grad():
        model(*batch())
    assert all(float(router.tally.sum()) == 0 for router in model.routers())


def test_weights_that_are_not_finite_show_in_the_loss_and_raise_nothing() -> None:
    model = built(MIXED)
    rows = batch()
    with torch.no_grad():
        model.token.weight[rows[0][0, 0]] = torch.nan
    logits = model(*rows)
    assert logits[0, 0].isnan().all()
    logits.square().mean().backward()
    for router in model.routers():
        assert router.tally.isfinite().all()


def test_bf16_follows_fp32() -> None:
    model = built(CONFIGS["softmax"])
    with torch.no_grad():
        exact = model(*batch())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*batch())
    assert rounded.dtype is torch.bfloat16
    # A token whose experts change by rounding may differ; most are as near as bfloat16 is.
    error = (rounded.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.05


def test_flops_are_those_of_the_products() -> None:
    model = built(replace(SMALL, moe=MoeConfig()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*batch())
    tokens = OFFSETS.shape[0] * LENGTH
    attention = 2 * 2 * SMALL.depth * LENGTH * SMALL.width  # by an op that the counter skips
    assert model.flops_per_token(LENGTH) == counter.get_total_flops() / tokens + attention
    mixed = built(MIXED)
    # Two of three MLPs are a router and two experts.
    assert mixed.flops_per_token(LENGTH) - model.flops_per_token(LENGTH) == 2 * (
        32 * (4 + 4 + 2 * 2) * 8 + 2 * LENGTH * 32
    ) + 2 * (3 * 32 * (40 + 2 * 2 * 24 - 2 * 40) + 2 * 32 * 6)


def test_gains_do_not_decay() -> None:
    names = built(CONFIGS["dense"]).no_decay_names()
    assert "blocks.0.attention.q_norm.weight" in names
    assert all("norm" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "moe", "message"),
    [
        ({}, {"num_experts": 2, "k": 3}, "moe.k: 3 given, but there are 2 experts"),
        (
            {"num_kv_heads": 3},
            {},
            "num_kv_heads: 3 does not divide num_heads 4; use one of 1, 2, 4",
        ),
        ({"width": 34}, {}, "num_heads: 4 does not divide width 34"),
        ({"width": 60}, {}, "makes heads of 15 features.*width 64 is the nearest"),
        ({"width": 2048}, {}, "makes heads of 512 features.*width 1024 is the nearest"),
        ({}, {"num_experts": 4, "k": 1}, "no gradient reaches the router"),
        ({}, {"num_experts": 4, "bias_speed": 0.1}, "a bias needs score=sigmoid"),
        ({}, {"num_experts": 4, "dense_blocks": 2}, "use at most 1"),
        ({}, {"shared_experts": 1}, "num_experts is none"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, int], moe: dict[str, float], message: str
) -> None:
    config = replace(SMALL, **changes, moe=MoeConfig(**moe))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        build_decoder(config, vocab_size=VOCABULARY, device="meta")
