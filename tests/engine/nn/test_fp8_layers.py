"""Which layers take 8-bit products, and the packages that can compute them."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carillon.engine.nn import fp8_foreign, fp8_layers
from carillon.engine.nn.fp8 import Fp8Linear
from carillon.engine.nn.fp8_layers import fp8_linears, full_products, provider_problems, to_fp8
from carillon.engine.nn.transformer import BlockShape, Transformer

SHAPE = BlockShape(
    width=32, num_heads=2, mlp_width=64, activation="gelu", qk_norm=True, causal=False
)
LINEARS = ["attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2"]


def stack(depth: int = 1) -> Transformer:
    torch.manual_seed(0)
    transformer = Transformer(SHAPE, depth)
    transformer.init_weights()
    return transformer


def test_linears_of_blocks_are_converted_and_nothing_else() -> None:
    odd = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24))
    routed = nn.ModuleDict({"router": nn.Linear(32, 16), "shared": nn.Linear(32, 16)})
    model = nn.ModuleDict(
        {"a": stack(), "b": nn.ModuleDict({"blocks": nn.ModuleList([odd, routed])})}
    )
    model["head"] = nn.Linear(32, 32)
    names = list(model.state_dict())
    layers = to_fp8(model, "rowwise")
    expected = [*(f"a.blocks.0.{name}" for name in LINEARS), "b.blocks.1.shared"]
    assert list(layers) == expected
    found = [name for name, module in model.named_modules() if type(module) is Fp8Linear]
    assert found == expected
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(("keep", "converted"), [(0, "01234"), (1, "123"), (2, "2"), (3, "")])
def test_first_and_last_blocks_are_kept(keep: int, converted: str) -> None:
    layers = to_fp8(stack(5), "tensorwise", keep_blocks=keep)
    assert list(layers) == [f"blocks.{index}.{name}" for index in converted for name in LINEARS]


@pytest.fixture
def torchao() -> None:
    if find_spec("torchao") is None:
        message = "torchao is not installed: pip install -e .[dev]"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have it: {message}")
        pytest.skip(message)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_torchao_multiplies_as_ours_does(recipe: Any, torchao: None) -> None:
    """Both round values to 8 bits, torchao by row with powers of two and e4m3 gradients: outputs
    and gradients are moved from those in full by about as much."""
    x = torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(2))
    results = {}
    for provider in ("full", "native", "torchao"):
        model = stack()
        names = list(model.state_dict())
        if provider != "full":
            layers = to_fp8(model, recipe, provider=provider)  # type: ignore[arg-type]
            assert len(layers) == 4
            assert all(type(layer) is not nn.Linear for layer in layers.values())
        assert list(model.state_dict()) == names
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
            y.float().square().mean().backward()
            with full_products(model):
                full = model(x)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results[provider] = torch.cat([y.detach().float().flatten(), 50 * torch.cat(gradients)])
        assert torch.equal(full, y) == (provider == "full")
        results[f"{provider}, switched"] = full.detach()
    assert torch.equal(results["torchao, switched"], results["full, switched"])
    moved = (results["native"] - results["full"]).norm()
    assert moved < 0.05 * results["full"].norm()
    assert moved / 2 < (results["torchao"] - results["full"]).norm() < 2 * moved


@pytest.mark.parametrize(
    ("provider", "recipe", "message"),
    [
        ("torchao", "blockwise", "torchao does not compute the recipe blockwise; set .*rowwise"),
        ("torchao", "tensorwise", "torchao given, .*not installed: pip install torchao"),
        ("transformer_engine", "delayed", "does not compute the recipe delayed; set .*blockwise"),
        ("transformer_engine", "blockwise", r"not installed: pip install .*transformer_engine\["),
    ],
)
def test_what_a_provider_cannot_do_is_told(
    provider: Any, recipe: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_layers, "find_spec", lambda name: None)
    assert any(re.search(message, problem) for problem in provider_problems(provider, recipe))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "delayed"])
@pytest.mark.parametrize("provider", ["auto", "native"])
def test_ours_computes_all_recipes(provider: Any, recipe: Any) -> None:
    assert list(provider_problems(provider, recipe)) == []


class _TheirLinear(nn.Linear):
    """Takes what Transformer Engine's documentation says, and tells how it was called."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=params_dtype)
        self.calls: list[tuple[tuple[int, ...], Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((tuple(x.shape), ENTERED[-1] if ENTERED else None))
        return super().forward(x)


ENTERED: list[Any] = []


@contextmanager
def _autocast(enabled: bool = True, recipe: Any = None) -> Iterator[None]:
    assert enabled
    ENTERED.append(recipe)
    yield
    ENTERED.pop()


def test_transformer_engine_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the documented signatures: the package needs a GPU."""
    recipes = SimpleNamespace(
        Float8CurrentScaling=lambda: "current", Float8BlockScaling=lambda: "blocks"
    )
    modules: dict[str, Any] = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"Linear": _TheirLinear, "autocast": _autocast},
        "transformer_engine.common": {"recipe": recipes},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["transformer_engine"].pytorch = sys.modules["transformer_engine.pytorch"]  # type: ignore[attr-defined]
    fp8_foreign._transformer_engine_class.cache_clear()
    model, x = stack(), torch.randn(2, 5, 32)
    plain = model(x)
    names = list(model.state_dict())
    layers: dict[str, Any] = to_fp8(model, "blockwise", provider="transformer_engine")
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), plain)
    assert [layer.calls for layer in layers.values()] == [
        [((16, width), "blocks")] for width in (32, 32, 32, 64)
    ]
    with full_products(model):
        torch.testing.assert_close(model(x), plain)
    assert all(len(layer.calls) == 1 for layer in layers.values())
    fp8_foreign._transformer_engine_class.cache_clear()


def test_linears_of_a_model_without_blocks() -> None:
    assert fp8_linears(nn.Sequential(nn.Linear(32, 32)), 0) == {}
