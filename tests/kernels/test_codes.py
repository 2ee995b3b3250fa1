"""Operands as codes and scales: bit for bit what they were, in the bits of their formats."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.codes import pack_operand, unpack_operand
from kernels.compilation import eager, use_compiler
from kernels.emulate import emulate
from kernels.gemm_recipes import GemmRecipe
from kernels.philox import Dice, Draw, NoiseKey
from kernels.quantised_linear import quantised_linear
from kernels.quantiser import Quantiser
from models.recipes import linear_recipe
from tests.kernels.oracles import KINDS, inputs
from tests.plain_nodes import shipped

BITS = [  # of an element, scales of blocks and groups included
    (Quantiser(format="nvfp4", block=(1, 16)), 4.5),
    (Quantiser(format="nvfp4", block=(16, 16), scale="paper"), 4 + 8 / 256),
    (Quantiser(format="nvfp4", block=(1, 16), four_over_six="mse", e4m3_max=256), 4.5),
    (Quantiser(format="nvfp4", block=(1, 16), scale="double_block", group=128), 4.75),
    (Quantiser(format="nvfp4", block=(1, 16), scale="ms_eden", group=128), 4.5),
    (Quantiser(format="ufp4", block=(1, 16)), 4.5),
    (Quantiser(format="mxfp4", block=(1, 32), scale="floor", element_headroom=4 / 3), 4.25),
    (Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"), 8.25),
    (Quantiser(format="mxfp8_e5m2", block=(1, 32), scale="floor"), 8.25),
    (Quantiser(format="fp8_e4m3", block=(0, 0)), 8),
    (Quantiser(format="fp8_e4m3", block=(1, 128), scale="power_of_two"), 8 + 8 / 128),
    (Quantiser(format="fp8_e4m3", block=(128, 128), scale="fp32"), 8 + 32 / 128**2),
]
DEQUANTISED = GemmRecipe(dequantised=True)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """The eager references, whatever has run before and runs next."""
    use_compiler(eager)
    yield
    use_compiler(eager)


def _dice() -> Dice:
    return Dice.of(NoiseKey(seed=1, step=2, samples=torch.arange(4)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)


@pytest.mark.parametrize(("quantiser", "bits"), BITS, ids=lambda v: getattr(v, "format", None))
def test_an_operand_comes_back_bit_for_bit_in_the_bits_of_its_format(
    quantiser: Quantiser, bits: float
) -> None:
    for kind in KINDS:
        x = inputs(kind, 128, 256)
        stochastic = quantiser.elements.name in ("e2m1", "e1m2") and not quantiser.four_over_six
        for draw in (None, Draw(_dice(), 3, 126)) if stochastic else (None,):
            operand = emulate(x, quantiser, 1, draw=draw)
            codes = pack_operand(operand, quantiser)
            back = unpack_operand(codes, quantiser)
            assert torch.equal(_bits(back.values), _bits(operand.values)), kind
            assert torch.equal(_bits(back.dequantised()), _bits(operand.dequantised())), kind
            stored = sum(t.nbytes for t in codes if t is not None and t.ndim)
            assert stored * 8 == bits * x.numel()


SAVED = {  # bits of an element of input and of weight
    "quartet2": (4.5, 4.5),
    "tetrajet_v2": (4.75, 4.75),
    "nvfp4_forward": (4.5, 4 + 8 / 256),
    "mxfp8": (8.25, 8.25),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_layer_keeps_codes_where_its_backward_pass_reads_quantised_operands(name: str) -> None:
    """And nothing else but a global scale of 32 bits for each of both."""
    recipe = linear_recipe(shipped("precision", name).default)
    if not recipe.dgrad.dequantised:
        recipe = replace(recipe, dgrad=DEQUANTISED, wgrad=DEQUANTISED)
    x, weight = inputs("normal", 64, 256).requires_grad_(), torch.randn(128, 256).requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        quantised_linear(x, weight, recipe, layer=0, dice=_dice())
    of_x, of_weight = SAVED[name]
    assert sum(saved.values()) == (x.numel() * of_x + weight.numel() * of_weight) / 8 + 2 * 4
