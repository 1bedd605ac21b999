"""What is logged of the routers, and the bias after a step."""

import pytest
import torch

from carillon.engine.nn.router import Router, RouterShape, Tally
from carillon.engine.parallel.routers import finish_step


def router(slots: list[int], **sums: float) -> Router:
    shape = RouterShape(
        width=8, num_experts=len(slots), k=2, score="sigmoid", bias_speed=0.5, capacity_factor=1.0
    )
    made = Router(shape)
    made.init_weights(std=0.02)
    named = {"dropped": 0.0, "z_loss": 0.0, "tokens": 12.0, "balance_loss": 0.0, "rows": 3.0} | sums
    values = Tally(torch.tensor(slots), **{k: torch.tensor([v]) for k, v in named.items()})
    made.tally.copy_(torch.cat([part.double() for part in values]))
    return made


def test_facts_of_all_layers_in_one_step() -> None:
    even = router([6, 6, 6, 6])
    uneven = router([0, 0, 0, 24], dropped=6.0, z_loss=6.0, balance_loss=12.0)
    assert finish_step([even, uneven], None) == pytest.approx(
        {
            "moe/max_load": 4.0,
            "moe/min_load": 0.0,
            "moe/mean_tokens_per_expert": 6.0,
            "moe/entropy": 0.5,  # 1 and 0
            "moe/dropped_share": 0.125,  # 0 and 6 of 24 slots
            "moe/z_loss": 0.25,
            "moe/balance_loss": 2.0,
        }
    )
    assert even.bias is not None
    assert uneven.bias is not None
    assert even.bias.tolist() == [0, 0, 0, 0]
    assert uneven.bias.tolist() == [0.5, 0.5, 0.5, -0.5]


def test_a_step_begins_anew_and_a_skipped_one_moves_nothing() -> None:
    uneven = router([0, 0, 0, 24])
    finish_step([uneven], None, move_bias=False)
    assert uneven.bias is not None
    assert not uneven.bias.any()
    assert not uneven.tally.any()
    facts = finish_step([uneven], None)  # without a token nothing is divided by zero
    assert facts["moe/max_load"] == 0
    assert not uneven.bias.any()


def test_a_model_without_routers_logs_nothing() -> None:
    assert finish_step([], None) == {}
