"""The history of amaxes: its rule, and that it goes on from a saved state."""

import pytest
import torch

from carillon.kernels.fp8_cast.amax_history import AmaxHistory
from carillon.kernels.fp8_cast.reference import Fp8Copies
from carillon.kernels.table import resolve

E4M3 = torch.float8_e4m3fn


def amax(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def test_scale_is_of_the_largest_of_the_last() -> None:
    history = AmaxHistory(3, E4M3)
    assert history.scale == 1
    for value, largest in [(448, 448), (896, 896), (44.8, 896), (4.48, 896), (2, 44.8), (1, 4.48)]:
        history.record(amax(value))
        assert history.scale == amax(largest) / 448


def test_margin_leaves_room() -> None:
    history = AmaxHistory(2, torch.float8_e5m2, margin=3)
    history.record(amax(7168.0))
    assert history.scale == 1
    codes, *_ = resolve("fp8_cast", "cpu")(
        torch.full((1, 1), 8 * 7168.0), "tensorwise", torch.float8_e5m2, history.scale
    )
    assert codes.float() == 57344  # eight times as large still fits


def test_nothing_and_nonsense_leave_the_scale() -> None:
    history = AmaxHistory(2, E4M3)
    history.record(amax(0.0))
    assert history.scale == 1
    history.record(amax(44.8))
    kept = history.scale
    for value in ("inf", "nan"):
        history.record(amax(float(value)))
        assert history.scale == kept
    history.record(amax(4.48))
    assert history.scale == amax(4.48) / 448
    history.record(amax(1e-44))
    history.record(amax(1e-44))
    assert history.scale == 2.0**-126


def test_several_tensors_are_recorded_at_a_time() -> None:
    together = AmaxHistory(2, E4M3, shape=(2, 2))
    apart = [AmaxHistory(2, E4M3) for _ in range(4)]
    for factor in (1.0, 8.0, 0.0, 2.0):
        amaxes = factor * torch.tensor([[1.0, 448.0], [torch.inf, 0.0]])
        together.record(amaxes)
        for history, value in zip(apart, amaxes.flatten(), strict=True):
            history.record(value)
        assert together.scale.flatten().tolist() == [float(h.scale) for h in apart]
    with pytest.raises(ValueError, match="must be 4 float32 values on cpu, got 1 of"):
        together.record(amax(1.0))


def test_scale_of_an_earlier_cast_does_not_change() -> None:
    history = AmaxHistory(1, E4M3)
    history.record(amax(448.0))
    earlier = history.scale
    history.record(amax(896.0))
    assert (earlier, history.scale) == (1, 2)


@pytest.mark.op("fp8_cast")
def test_a_run_goes_on_from_a_state_in_its_middle(provider: str, device: str) -> None:
    op = resolve("fp8_cast", device, provider)
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn((9, 20), generator=generator) * 2**step for step in range(7)]
    steps = [x.to(device) for x in drawn]

    def run(history: AmaxHistory, steps: list[torch.Tensor]) -> list[Fp8Copies]:
        results = []
        for x in steps:
            results.append(Fp8Copies(*op(x, "tensorwise", E4M3, history.scale, column=True)))
            history.record(results[-1].amax)
        return results

    whole = run(AmaxHistory(3, E4M3), steps)
    first = AmaxHistory(3, E4M3)
    run(first, steps[:4])
    state = first.state_dict()
    run(first, steps[4:])  # what follows does not reach the state
    resumed = AmaxHistory(3, E4M3)
    resumed.load_state_dict(state)
    for got, wanted in zip(run(resumed, steps[4:]), whole[4:], strict=True):
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one.float(), other.float())
    assert torch.equal(resumed.state_dict()["amaxes"], first.state_dict()["amaxes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0, "dtype": E4M3}, "length must be at least 1, got 0"),
        ({"length": 4, "dtype": torch.float16}, "dtype must be float8_e4m3fn or float8_e5m2, got"),
        ({"length": 4, "dtype": E4M3, "margin": -1}, "margin must be between 0 and 16, got -1"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AmaxHistory(**arguments)  # type: ignore[arg-type]


def test_bad_amaxes_and_states() -> None:
    history = AmaxHistory(2, E4M3)
    for wrong in (torch.ones(2), amax(1.0).double(), amax(1.0).to("meta")):
        with pytest.raises(ValueError, match="one float32 value on cpu, got"):
            history.record(wrong)
    state = history.state_dict()
    with pytest.raises(ValueError, match=r"amaxes, next and scale, got \['amaxes'\]"):
        history.load_state_dict({"amaxes": state["amaxes"]})
    with pytest.raises(ValueError, match="of 3 amaxes at 0, this history has 2"):
        history.load_state_dict(AmaxHistory(3, E4M3).state_dict())
    with pytest.raises(ValueError, match="of 2 amaxes at 5, this history has 2"):
        history.load_state_dict(state | {"next": 5})
