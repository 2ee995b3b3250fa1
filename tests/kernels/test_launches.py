"""What a layer costs a GPU, counted without one: kernels launched and bytes moved.

The speeds that they stand for are measured by `make gpu`. Triton's kernels are replaced by records
of their launches; torch's are the leaves of a profile.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels import emulate, hadamard, operand_pairs, philox, scaled_mm, state_pass
from kernels.operands import Delayed
from kernels.philox import Dice, Draw, NoiseKey
from kernels.quantised_linear import quantised_linear
from kernels.recurrence import recurrence
from models.flops import training_flops
from models.recipes import linear_recipe
from tests.kernels.recurrence_cases import gradients, inputs
from tests.plain_nodes import shipped

pytest.importorskip("triton", reason="needs triton")
ROWS, COLS = 128, 256
# What changes a tensor's description, or asks for memory, is no kernel.
FREE = re.compile(
    "empty|view|stride|select|slice|expand|transpose|detach|resize|alias|reshape|squeeze|item"
    "|local_scalar|result_type|resolve_conj|narrow|permute|movedim|split|chunk"
    "|numpy_T|aten::(to?|mT|mH)$"
)


class _Recorded:
    """A Triton kernel that notes the bytes of its tensors, and computes nothing."""

    def __init__(self, name: str, launches: list[tuple[str, int]]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            large = {t.data_ptr(): t.numel() * t.element_size() for t in arguments if _large(t)}
            self.launches.append((self.name, sum(large.values())))

        return launch


def _large(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.numel() >= ROWS * COLS // 16


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The launches of Triton kernels, as on a GPU: (name, bytes of its large tensors)."""
    from kernels import (
        triton_blocks,
        triton_hadamard,
        triton_nvfp4,
        triton_philox,
        triton_state_pass,
    )

    noted: list[tuple[str, int]] = []
    quantising = (triton_blocks, triton_hadamard, triton_nvfp4, triton_philox)
    for module in (*quantising, triton_state_pass):
        for name, value in vars(module).items():
            if name.startswith("_") and type(value).__name__ == "JITFunction":
                monkeypatch.setattr(module, name, _Recorded(name, noted))

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        noted.append(("mm", 4 * len(a) * b.shape[1]))
        return a.new_empty(len(a), b.shape[1], dtype=torch.float32)

    def multiply_float8(a: Tensor, b: Tensor, factor: Tensor, fp32: bool) -> Tensor:
        assert a.is_contiguous()  # so that nothing is copied
        assert b.T.is_contiguous()
        noted.append(("mm", 0))
        return multiply(a, b) if fp32 else multiply(a, b).bfloat16()

    monkeypatch.setattr(torch.ops.espalier, "product", multiply)
    monkeypatch.setattr(torch.ops.espalier, "float8_mm", multiply_float8)
    monkeypatch.setattr(scaled_mm, "_applies_factor", lambda a, factor: False)
    for user in (emulate, hadamard, operand_pairs, philox, state_pass):
        monkeypatch.setattr(user, "triton_agrees", lambda device, compare: True)
    return noted


def _launched_by_torch(
    run: Callable[[], object], launches: list[tuple[str, int]]
) -> "Counter[str]":
    """Return the kernels of torch in a second run, and leave those of Triton in `launches`."""
    run()
    launches.clear()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return Counter(
        event.name
        for event in profiled.events() or ()
        if _computes(event.name) and not any(_computes(child.name) for child in event.cpu_children)
    )


def _computes(name: str) -> bool:
    return name.startswith("aten::") and not FREE.search(name)


def _draw(stream: int) -> Draw:
    dice = Dice.of(NoiseKey(seed=0, step=0, samples=torch.arange(4)))
    return Draw(dice, stream, ROWS)


def test_a_gradient_becomes_both_operands_by_two_kernels_and_8_bytes_an_element(
    launches: list[tuple[str, int]],
) -> None:
    """Read for the maxima, read and twice written, with a byte for each scale."""
    from kernels.triton_nvfp4 import quantise_both

    x = torch.zeros(ROWS, COLS, dtype=torch.bfloat16)
    quantise_both(x, hadamard.hadamard_matrix(16), (_draw(1), _draw(2)))
    assert [name for name, _ in launches] == ["_amax", "_quantise_both"]
    assert sum(count for _, count in launches) == 8 * ROWS * COLS + 2 * ROWS * COLS // 16


def test_formats_of_blocks_take_one_kernel_and_4_bytes_an_element(
    launches: list[tuple[str, int]],
) -> None:
    quantiser = linear_recipe(shipped("precision", "mxfp8").default).fprop.left
    assert quantiser is not None
    emulate.emulate(torch.zeros(ROWS, COLS, dtype=torch.bfloat16), quantiser.quantiser, 1)
    assert [name for name, _ in launches] == ["_blocks"]
    assert sum(count for _, count in launches) == 4 * ROWS * COLS  # scales are below a 16th


def _noise() -> Dice:
    return Dice.of(NoiseKey(seed=0, step=0, samples=torch.arange(4)))


def _layer(
    name: str, tokens: int, k: int, n: int, *, tensor_cores: bool = False
) -> Callable[[], object]:
    """Return the forward and the backward pass of a linear layer under a shipped recipe."""
    recipe = linear_recipe(shipped("precision", name).default)
    x, grad = (torch.zeros(tokens, size, dtype=torch.bfloat16) for size in (k, n))
    weight, dice = torch.zeros(n, k, requires_grad=True), _noise()
    delayed = Delayed(torch.ones(6), torch.zeros(6))
    x.requires_grad_()

    def run() -> object:
        y = quantised_linear(
            x, weight, recipe, layer=0, dice=dice, delayed=delayed, tensor_cores=tensor_cores
        )
        return torch.autograd.grad(y, (x, weight), grad)

    return run


# Of a layer's forward and backward pass: kernels of Triton and three products; and at most so many
# of torch, of which three apply the factors of products and the others are on single numbers.
KERNELS = {
    "nvfp4": (10, 19),
    "mxfp8": (9, 6),
    "mxfp4": (10, 8),
    "fp8_current": (9, 9),
    "fp8_delayed": (8, 30),
    "fp8_block": (8, 6),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_launches_so_many_kernels(name: str, launches: list[tuple[str, int]]) -> None:
    leaves = _launched_by_torch(_layer(name, ROWS, COLS, COLS), launches)
    of_triton, of_torch = KERNELS[name]
    assert len(launches) == of_triton, Counter(name for name, _ in launches)
    assert leaves.total() <= of_torch, leaves


def _step(name: str, launches: list[tuple[str, int]], *, tensor_cores: bool) -> tuple[float, float]:
    """Return the bytes that quantising moves in a block of 950M, and those of its products' output.

    By layers of a sixteenth of every size, whose tensors are all 256 times smaller.
    """
    cfg = shipped("model", "mobilellm_950m")
    width, qkv = cfg.width, cfg.width + 2 * cfg.width * cfg.num_kv_heads // cfg.num_heads
    quantising = products = 0
    for k, n in ((width, qkv), (width, width), (width, 2 * cfg.hidden), (cfg.hidden, width)):
        launches.clear()
        _layer(name, TOKENS // 16, k // 16, n // 16, tensor_cores=tensor_cores)()
        products += 256 * sum(count for kernel, count in launches if kernel == "mm")
        quantising += 256 * sum(count for kernel, count in launches if kernel != "mm")
    return quantising, products


# Of an H100: dense bf16, and of its memory the share that kernels of this kind reach.
FLOPS, BYTES = 989e12, 0.8 * 3.35e12
TOKENS = 4 * 2048


def test_an_emulated_step_of_950m_takes_at_most_1_35_of_one_in_bf16(
    launches: list[tuple[str, int]],
) -> None:
    """By its bytes, beside a step at half of peak.

    A product leaves in fp32 and is read so by the kernel that applies its factor: 4 bytes an
    output more than in bf16. `nvfp4` leaves 3 of the 22 blocks in bf16.
    """
    cfg = shipped("model", "mobilellm_950m")
    step_s = training_flops(cfg.forward_flops_per_sequence(50304, 2048)[0]) * 4 / (0.5 * FLOPS)
    quantising, products = _step("nvfp4", launches, tensor_cores=False)
    assert (quantising + products) * (cfg.depth - 3) / BYTES < 0.35 * step_s


def test_fp8_tensor_cores_save_more_than_quantising_costs(launches: list[tuple[str, int]]) -> None:
    """They halve the time of the products, and nothing is copied to be laid out for them."""
    cfg = shipped("model", "mobilellm_950m")
    kv = cfg.width * cfg.num_kv_heads // cfg.num_heads
    weights = cfg.width * (2 * cfg.width + 2 * kv + 3 * cfg.hidden)
    quantising, _ = _step("fp8_current", launches, tensor_cores=True)
    assert quantising / BYTES < 0.9 * 0.5 * 6 * weights * TOKENS / FLOPS
    assert Counter(name for name, _ in launches) == {"_amax": 3, "_float8": 3, "mm": 6}


# Forward and backward, for any number of chunks; chunk after chunk would add so many for each.
RECURRENCES = {"scalar": (105, 45), "wide": (110, 45), "delta": (170, 55)}


@pytest.mark.parametrize("kind", RECURRENCES)
def test_a_recurrence_launches_as_many_kernels_for_any_number_of_chunks(
    kind: str, launches: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(chunks: int) -> int:
        given = inputs(kind, (2, 2, 8 * chunks, 4, 4))
        leaves = _launched_by_torch(lambda: gradients(given, recurrence, 8), launches)
        return leaves.total() + len(launches)

    most, for_each = RECURRENCES[kind]
    assert launched(3) == launched(6) <= most
    assert [name for name, _ in launches] == ["_pass", "_pass"]
    monkeypatch.setattr(state_pass, "triton_agrees", lambda device, compare: False)
    assert launched(6) - launched(3) >= 3 * for_each
