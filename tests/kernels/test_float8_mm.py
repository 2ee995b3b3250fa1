"""FP8 products by `torch._scaled_mm`, which a CPU computes too, against the emulation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.float8_mm import FORMATS, float8_mm, passed_over, wrong_product
from kernels.operands import Delayed, fits_float8
from kernels.philox import Dice, NoiseKey
from kernels.quantised_linear import quantised_linear
from models.recipes import linear_recipe
from tests.plain_nodes import PRECISIONS, shipped

CPU = torch.device("cpu")
TENSOR_WIDE = ["fp8_current", "fp8_delayed"]


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's checks of the arguments, which a CPU leaves out."""
    multiply = torch._scaled_mm

    def checked(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        assert {a.dtype, b.dtype} <= set(FORMATS.values())
        assert not a.dtype == b.dtype == torch.float8_e5m2
        assert a.stride(1) == 1
        assert b.stride(0) == 1
        assert a.shape[1] == b.shape[0]
        assert a.shape[1] % 16 == 0
        assert b.shape[1] % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.numel() == scale_b.numel() == 1
        return multiply(a, b, scale_a, scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", checked)


@pytest.mark.parametrize("first", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("fp32", [True, False])
def test_products_are_those_of_the_values(first: str, fp32: bool) -> None:
    """Any summed size: 40 is no multiple of 16. fp32 sums err by k * 2**-24 of the magnitudes."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(24, 40, generator=generator).to(FORMATS[first])
    b = torch.randn(32, 40, generator=generator).to(torch.float8_e4m3fn)
    product = float8_mm(a, b.T, torch.tensor(0.3), fp32)
    exact = a.double() @ b.double().T * torch.tensor(0.3).double()
    magnitudes = a.double().abs() @ b.double().abs().T
    half_a_step = 0.0 if fp32 else 2.0**-8
    assert product.dtype == (torch.float32 if fp32 else torch.bfloat16)
    bound = magnitudes * 40 * 2.0**-24 + exact.abs() * half_a_step
    assert ((product.double() - exact).abs() <= bound).all()


def _layer(name: str, *, float8: bool) -> tuple[list[Tensor], int]:
    """Return output and gradients of a layer, and the bytes that it saves for its backward pass."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(size, 64, generator=generator) for size in (40, 64, 40))
    x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    amax = torch.full((6,), 4.0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = quantised_linear(
            x,
            weight,
            linear_recipe(shipped("precision", name).default),
            layer=0,
            dice=Dice.of(NoiseKey(seed=0, step=0, samples=torch.arange(4))),
            delayed=Delayed(amax, torch.zeros_like(amax)),
            tensor_cores=float8,
        )
    y.backward(grad.bfloat16())
    assert x.grad is not None
    assert weight.grad is not None
    return [t.detach().float() for t in (y, x.grad, weight.grad)], sum(saved.values())


@pytest.mark.parametrize("name", TENSOR_WIDE)
def test_a_layer_is_the_emulated_one_but_for_the_order_of_sums(name: str) -> None:
    (emulated, _), (native, _) = _layer(name, float8=False), _layer(name, float8=True)
    for a, b in zip(emulated, native, strict=True):
        assert float((a - b).norm() / a.norm()) < 2**-8


def test_a_layer_keeps_the_codes_that_its_backward_pass_multiplies() -> None:
    """One byte an element of input and weight, and two scales of four bytes."""
    _, saved = _layer("fp8_current", float8=True)
    assert saved == 40 * 64 + 64 * 64 + 2 * 4


def test_the_recipes_that_it_multiplies_are_those_with_scales_of_tensors() -> None:
    fits = {n for n in PRECISIONS if fits_float8(linear_recipe(shipped("precision", n).default))}
    assert fits == set(TENSOR_WIDE)


def test_a_device_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passed_over(CPU) == "only a GPU has FP8 tensor cores"
    assert wrong_product(CPU) is None
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *_, **__: torch.zeros(len(a), b.shape[1]))
    wrong = "torch._scaled_mm: fp8_e4m3 by fp8_e4m3 is off by 1.000 of its norm"
    assert wrong_product(CPU) == wrong
