"""image_normalize: each provider against the definition evaluated in float64."""

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import load_native, resolve
from carillon.kernels.tolerances import TOLERANCES

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.op("image_normalize")
# One pixel; odd rows that no vector width divides; more than one task of 8192 pixels a picture, so
# that a task crosses from one picture to the next; a picture narrower than a vector.
SHAPES = [(1, 1, 1), (3, 17, 13), (2, 97, 101), (5, 224, 1), (1, 1, 9001), (4, 64, 64)]


def pictures(num_images: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (num_images, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def definition(images: Tensor) -> Tensor:
    mean = torch.tensor(MEAN, dtype=torch.float64)
    std = torch.tensor(STD, dtype=torch.float64)
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def assert_close(got: Tensor, images: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES["image_normalize", dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.cpu().double(), definition(images.cpu()), atol=tolerance.atol, rtol=tolerance.rtol
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(
    provider: str, device: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    images = pictures(*shape)
    got = resolve("image_normalize", device, provider)(images.to(device), MEAN, STD, dtype)
    assert got.is_contiguous()
    assert_close(got, images, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_value(provider: str, device: str, dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 3)
    got = resolve("image_normalize", device, provider)(images.to(device), MEAN, STD, dtype)
    assert_close(got, images, dtype)


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)])
def test_empty(provider: str, device: str, shape: tuple[int, int, int]) -> None:
    images = pictures(*shape).to(device)
    got = resolve("image_normalize", device, provider)(images, MEAN, STD, torch.float32)
    assert got.shape == (shape[0], 3, *shape[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(provider: str, device: str, dtype: torch.dtype) -> None:
    whole = pictures(6, 40, 50).to(device)
    op = resolve("image_normalize", device, provider)
    for images in (whole[::2, 3:, ::2], whole.transpose(1, 2), whole[:1].expand(4, -1, -1, -1)):
        assert not images.is_contiguous()
        assert_close(op(images, MEAN, STD, dtype), images, dtype)


@pytest.mark.parametrize(
    ("images", "mean", "std", "dtype", "message"),
    [
        (torch.zeros(1, 4, 4, 3), MEAN, STD, torch.float32, "must be uint8"),
        (pictures(1, 4, 4)[0], MEAN, STD, torch.float32, r"shape \(N, H, W, 3\)"),
        (pictures(1, 4, 4)[..., :1], MEAN, STD, torch.float32, r"shape \(N, H, W, 3\)"),
        (pictures(1, 4, 4), MEAN, STD, torch.float16, "float32 or bfloat16"),
        (pictures(1, 4, 4), MEAN[:2], STD, torch.float32, "3 values, got 2 and 3"),
        (pictures(1, 4, 4), MEAN, (*STD, 1.0), torch.float32, "3 values, got 3 and 4"),
        (pictures(1, 4, 4), MEAN, (0.0, 1.0, 1.0), torch.float32, "finite and positive"),
        (pictures(1, 4, 4), (float("nan"), 0.0, 0.0), STD, torch.float32, "must be finite"),
    ],
)
def test_bad_arguments_name_what_is_allowed(
    provider: str,
    device: str,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("image_normalize", device, provider)(images.to(device), mean, std, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 7), (0, 4, 4)])
def test_opcheck(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    with_cuda = load_native()
    if device == "cuda" and not with_cuda:
        pytest.skip("the native module was built without CUDA")
    arguments = (pictures(*shape).to(device), list(MEAN), list(STD), dtype)
    torch.library.opcheck(torch.ops.carillon.image_normalize.default, arguments)


def test_one_and_two_threads_agree_to_the_bit() -> None:
    images = pictures(3, 120, 130)
    op = resolve("image_normalize", "cpu", "native")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = op(images, MEAN, STD, torch.bfloat16)
        torch.set_num_threads(2)
        two = op(images, MEAN, STD, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
