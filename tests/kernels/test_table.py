"""The choice of a provider: by device, by name, and what is said of one that cannot run."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carillon.kernels import table
from carillon.kernels.table import OPS, ProviderError, load_native, resolve
from carillon.kernels.tolerances import TOLERANCES


@pytest.fixture
def fresh_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test see load_native's first call; the operators themselves stay registered."""
    load_native()
    load_native.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    load_native.cache_clear()
    for op in OPS.values():
        registration = importlib.import_module(f"{op.home}.registration")
        monkeypatch.setattr(registration, "register", lambda namespace: None)
    load_native()


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_whole(op: str) -> None:
    """Native by default on the CPU, a reference to compare with, and a tolerance per dtype."""
    assert OPS[op].providers["cpu"][0] == "native"
    assert resolve(op, "cpu") is getattr(torch.ops.carillon, op)
    assert resolve(op, "cpu", "reference").__module__ == f"{OPS[op].home}.reference"
    assert {name for name, _ in TOLERANCES} == set(OPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("image_normalise", "cpu"), "unknown op 'image_normalise': the ops are .*image_normalize"),
        (("image_normalize", "meta"), "runs on cpu, cuda; the device is 'meta'"),
        (("image_normalize", "cpu", "triton"), "has the providers native, reference; got 'triton'"),
    ],
)
def test_unknown_choices_list_the_known(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(*arguments)


def test_a_choice_does_not_cut_a_compiled_graph() -> None:
    """Each op that is asked for there is the right one; with fullgraph a cut would raise."""

    def normalized_and_routed(pictures: torch.Tensor, scores_TE: torch.Tensor) -> Any:
        normalize = resolve("image_normalize", pictures.device)
        topk = resolve("moe_topk", scores_TE.device)
        pixels = normalize(pictures, (0.5,) * 3, (0.25,) * 3, torch.float32)
        return pixels, *topk(scores_TE, 2)

    given = torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3), torch.randn(5, 4)
    compiled = torch.compile(normalized_and_routed, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*given), normalized_and_routed(*given), strict=True):
        torch.testing.assert_close(found, expected)


def test_missing_module_says_how_to_build(fresh_native: pytest.MonkeyPatch) -> None:
    import carillon

    fresh_native.delattr(carillon, "_C", raising=False)
    fresh_native.setitem(sys.modules, "carillon._C", None)
    with pytest.raises(ProviderError, match=r"pip install -e \. --no-build-isolation"):
        resolve("image_normalize", "cpu")
    assert callable(resolve("image_normalize", "cpu", "reference"))


def test_module_of_another_torch_is_refused(fresh_native: pytest.MonkeyPatch) -> None:
    from carillon import _C

    fresh_native.setattr(_C, "TORCH_VERSION", "2.0.0")
    with pytest.raises(ProviderError, match=r"built for torch 2\.0\.0, and torch .* runs"):
        resolve("image_normalize", "cpu", "native")


def test_cuda_without_cuda_operators_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "load_native", lambda: False)
    with pytest.raises(ProviderError, match="was built without CUDA"):
        resolve("image_normalize", torch.device("cuda", 0), "native")


def test_native_module_says_what_it_was_built_for() -> None:
    from carillon import _C

    details: dict[str, Any] = {"torch": _C.TORCH_VERSION, "cuda": _C.WITH_CUDA}
    assert details["torch"] == torch.__version__.split("+")[0]
    assert isinstance(details["cuda"], bool)


def test_python_providers_run_on_the_device_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[torch.device] = []

    class Entered:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *error: object) -> None:
            entered.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "device", Entered)
    there = torch.empty(2, device="meta")
    seen = table._on_its_device(lambda *given, **settings: (given, settings, list(entered)))
    given, settings, before = seen("name", None, there, k=1)
    assert (given, settings) == (("name", None, there), {"k": 1})
    assert before == [there.device]
    assert entered == [there.device, torch.device("cpu")]
