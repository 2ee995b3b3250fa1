"""Products in NVFP4, MXFP4 and MXFP8 by `torch._scaled_mm`, against the emulation.

No CPU multiplies these formats: the function is replaced by its contract, the GPU's checks of the
arguments and an fp64 product of what the bytes stand for.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block_scaled_mm import (
    BLOCKS,
    passed_over,
    swizzle_scales,
    unswizzle_scales,
    wrong_product,
)
from kernels.compilation import eager, use_compiler
from kernels.emulate import emulate
from kernels.format_names import Format
from kernels.formats import E2M1, E4M3, decode, decode_e8m0, unpack
from kernels.philox import Dice, NoiseKey
from kernels.quantised_linear import quantised_linear
from kernels.quantiser import Quantiser
from kernels.scaled_mm import scaled_mm
from kernels.tensor_cores import formats_of_blocks
from models.recipes import linear_recipe
from tests.kernels.oracles import inputs
from tests.plain_nodes import PRECISIONS, shipped

CPU = torch.device("cpu")
NVFP4 = Quantiser(format="nvfp4", block=(1, 16))
QUANTISERS = [
    NVFP4,
    replace(NVFP4, block=(16, 16)),
    replace(NVFP4, row_scaled=True),
    replace(NVFP4, four_over_six="mse", e4m3_max=256),
    replace(NVFP4, scale="ms_eden", group=128),
    Quantiser(format="mxfp4", block=(1, 32), scale="floor", element_headroom=4 / 3),
    Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
]


def _multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, size: int) -> Tensor:
    """Check the arguments as a GPU does, and return the product in fp32."""
    assert a.dtype == b.dtype
    assert scale_a.dtype == scale_b.dtype
    assert a.stride(1) == 1
    assert b.stride(0) == 1
    assert a.shape[1] == b.shape[0]
    assert a.shape[1] % 16 == 0  # stored columns
    assert b.shape[1] % 16 == 0
    sides = []
    for codes, scales in ((a, scale_a), (b.T, scale_b)):
        four_bits = codes.dtype == torch.float4_e2m1fn_x2
        stored = codes.contiguous().view(torch.uint8)
        values = decode(unpack(stored), E2M1) if four_bits else decode(stored, E4M3)
        rows, cols = values.shape[0], values.shape[1] // size
        assert scales.is_contiguous()
        assert scales.numel() == -(-rows // 128) * 128 * (-(-cols // 4) * 4)
        each = unswizzle_scales(scales.view(torch.uint8), rows, cols)
        of_blocks = decode(each, E4M3) if size == 16 else decode_e8m0(each)
        sides.append(values.double() * of_blocks.double().repeat_interleave(size, 1))
    return (sides[0] @ sides[1].T).float()


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype
    ) -> Tensor:
        assert out_dtype == torch.float32
        nvfp4 = scale_a.dtype == torch.float8_e4m3fn
        assert a.dtype == (torch.float4_e2m1fn_x2 if nvfp4 else torch.float8_e4m3fn)
        assert nvfp4 or scale_a.dtype == torch.float8_e8m0fnu
        return _multiply(a, b, scale_a, scale_b, 16 if nvfp4 else 32)

    def second(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        assert a.dtype == torch.float4_e2m1fn_x2
        assert scale_a.dtype == torch.float8_e8m0fnu
        assert options.pop("output_dtype") == torch.float32
        recipe, swizzle = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
        wanted = {f"scale_recipe_{side}": recipe for side in "ab"}
        assert options == wanted | {f"swizzle_{side}": swizzle for side in "ab"}
        return _multiply(a, b, scale_a, scale_b, 32)

    monkeypatch.setattr(torch, "_scaled_mm", first)
    monkeypatch.setattr(F, "scaled_mm", second)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """The eager references, whatever has run before and runs next."""
    use_compiler(eager)
    yield
    use_compiler(eager)


@pytest.mark.parametrize(("rows", "cols"), [(200, 10), (128, 4), (32, 1)])
def test_scales_lie_where_cublas_reads_them(rows: int, cols: int) -> None:
    """Byte (i, j) of 128 x 4 tiles by the formula of cuBLAS's manual; the rest is 0."""
    scales = torch.randint(1, 256, (rows, cols), generator=torch.Generator().manual_seed(0))
    scales = scales.to(torch.uint8)
    wide = -(-cols // 4)
    oracle = torch.zeros(-(-rows // 128) * wide * 512, dtype=torch.uint8)
    for i in range(rows):
        for j in range(cols):
            tile = i // 128 * wide + j // 4
            oracle[tile * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4] = scales[i, j]
    swizzled = swizzle_scales(scales)
    assert torch.equal(swizzled, oracle)
    assert torch.equal(unswizzle_scales(swizzled, rows, cols), scales)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("quantiser", QUANTISERS, ids=lambda q: f"{q.format}-{q.scale}")
@pytest.mark.parametrize("sums", [(1, 1), (1, 0), (0, 0)])
def test_products_are_those_of_the_emulation_but_for_the_order_of_sums(
    quantiser: Quantiser, sums: tuple[int, int]
) -> None:
    """Any number of rows, summed sizes of whole blocks; fp32 sums err by k * 2**-24."""
    k = 128 if quantiser.group else 96
    sides = []
    for kind, rows, dim in (("normal", 48, sums[0]), ("lognormal", 80, sums[1])):
        x = inputs(kind, rows, k, seed=dim)
        sides.append(emulate(x if dim == 1 else x.T.contiguous(), quantiser, dim))
    on_cores = [replace(side, format=quantiser.format) for side in sides]
    emulated = scaled_mm(*sides, sums=sums, fp32=True)
    product = scaled_mm(*on_cores, sums=sums, fp32=True)
    magnitudes = [replace(side, values=side.values.abs()) for side in sides]
    bound = scaled_mm(*magnitudes, sums=sums, fp32=True) * k * 2.0**-23
    assert ((product - emulated).abs() <= bound).all()
    rounded = scaled_mm(*on_cores, sums=sums, fp32=False)
    assert torch.equal(rounded, product.bfloat16())  # the factor first, then one rounding


IN_NVFP4 = [
    *("nvfp4", "nvfp4_no_sr", "nvfp4_no_rht", "nvfp4_no_2d", "nvfp4_all_layers"),
    *("nvfp4_forward", "nvfp4_backward", "nemotron3_super", "quartet2", "averis"),
]
FITS = {name: ["nvfp4"] for name in IN_NVFP4} | {
    "mxfp4": ["mxfp4"],
    "mxfp4_tseng": ["mxfp4"],
    "mxfp8": ["mxfp8_e4m3"],
}


def test_the_recipes_that_it_multiplies_have_both_operands_in_one_format() -> None:
    fits = {
        n: formats_of_blocks(linear_recipe(shipped("precision", n).default)) for n in PRECISIONS
    }
    assert {name: list(formats) for name, formats in fits.items() if formats} == FITS


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("name", ["nvfp4", "quartet2", "mxfp4_tseng", "mxfp8"])
def test_a_layer_is_the_emulated_one_but_for_the_order_of_sums(name: str) -> None:
    recipe = linear_recipe(shipped("precision", name).default)
    results = []
    for tensor_cores in (False, True):
        x, weight = inputs("normal", 40, 128), inputs("normal", 128, 128, seed=1)
        x, weight = x.bfloat16().requires_grad_(), weight.float().requires_grad_()
        dice = Dice.of(NoiseKey(seed=0, step=0, samples=torch.arange(4)))
        y = quantised_linear(x, weight, recipe, layer=0, dice=dice, tensor_cores=tensor_cores)
        grad = inputs("normal", 40, 128, seed=2).bfloat16()
        results.append([y.detach(), *torch.autograd.grad(y, (x, weight), grad)])
    for a, b in zip(*results, strict=True):
        assert float((a.float() - b.float()).norm() / a.float().norm()) < 2**-8


@pytest.mark.parametrize("format", BLOCKS)
def test_a_device_is_tried_before_it_is_used(
    format: Format, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passed_over(CPU, format) == f"only a GPU has {format} tensor cores"
    request.getfixturevalue("tensor_cores")
    assert wrong_product(CPU, format) is None

    def zeros(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setattr(torch, "_scaled_mm", zeros)
    monkeypatch.setattr(F, "scaled_mm", zeros)
    assert wrong_product(CPU, format) == f"torch._scaled_mm: {format} is off by 1.000 of its norm"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 5)
    assert passed_over(gpu, format) == (
        f"torch._scaled_mm in {format} needs compute capability 10.0, not 9.0"
    )
    passed_over.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    why = passed_over(gpu, format)  # there is none here: what it raises is the reason
    assert why is not None
    assert why.startswith("torch._scaled_mm failed: ")
    passed_over.cache_clear()
