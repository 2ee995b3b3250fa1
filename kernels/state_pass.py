"""The pass over the states of chunks, the one sequential part of `kernels/recurrence.py`.

    S_(c+1) = decay_c S_c - erase_c S_c + added_c

Its gradient is the same pass from the last chunk to the first, with erase transposed. On a GPU the
pass is one Triton kernel; what leads to its terms and from its states is parallel over chunks.

Shape legend: batch, heads, chunks, k = key width, v = value width.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.triton_check import triton_agrees

WIDEST_ERASED = 128  # key width up to which the kernel holds erase and the state on the chip


def pass_states(
    added: Float[Tensor, "batch heads chunks k v"],
    decay: Float[Tensor, "batch heads chunks decays 1"],
    erase: Float[Tensor, "batch heads chunks k k"] | None,
    first: Float[Tensor, "batch heads k v"],
) -> tuple[Float[Tensor, "batch heads chunks k v"], Float[Tensor, "batch heads k v"]]:
    """Return (the state at the beginning of each chunk, the state after the last), in fp32.

    All sums are fp32, products to 2**-21. Call it where `has_state_pass`.

    Args:
        decay: one factor for a state (decays = 1) or one for each key dimension (decays = k).
        erase: of the delta rule, k at most WIDEST_ERASED; None: the plain recurrence.
        first: the state before the first chunk.
    """
    entering, leaving = torch.ops.espalier.pass_states(added, decay, erase, first, False)
    return entering, leaving


# A constant: torch.compile would trace the comparison.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_state_pass(device: torch.device) -> bool:
    """Return whether `pass_states` computes on `device`."""
    return triton_agrees(device, _compare)


@torch.library.custom_op("espalier::pass_states", mutates_args=())
def _pass_states(
    added: Tensor, decay: Tensor, erase: Tensor | None, first: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    from kernels import triton_state_pass  # noqa: PLC0415

    return triton_state_pass.pass_states(added, decay, erase, first, backward=backward)


@_pass_states.register_fake
def _(
    added: Tensor, decay: Tensor, erase: Tensor | None, first: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    return added.new_empty(added.shape), added.new_empty(first.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, decay, erase, _, ctx.backward = inputs
    ctx.save_for_backward(decay, erase, output[0])


def _gradients(
    ctx: Any, entering_grad: Tensor, leaving_grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    decay, erase, entering = ctx.saved_tensors
    # What enters a chunk from behind is the gradient of what the chunk leaves, hence of `added`.
    behind, of_first = torch.ops.espalier.pass_states(
        entering_grad, decay, erase, leaving_grad, not ctx.backward
    )
    of_decay = of_erase = None
    if ctx.needs_input_grad[1]:
        summed = -1 if decay.shape[-2] > 1 else (-2, -1)
        of_decay = (behind * entering).sum(summed, keepdim=True)
    if erase is not None and ctx.needs_input_grad[2]:
        left, right = (entering, behind) if ctx.backward else (behind, entering)
        of_erase = -(left @ right.mT)
    return behind, of_decay, of_erase, of_first, None


_pass_states.register_autograd(_gradients, setup_context=_keep)


def eager_pass(
    added: Float[Tensor, "batch heads chunks k v"],
    decay: Float[Tensor, "batch heads chunks decays 1"],
    erase: Float[Tensor, "batch heads chunks k k"] | None,
    first: Float[Tensor, "batch heads k v"],
    *,
    backward: bool,
) -> tuple[Float[Tensor, "batch heads chunks k v"], Float[Tensor, "batch heads k v"]]:
    """Return `pass_states` by the reference, on any device and in the dtype of its arguments.

    Args:
        backward: from the last chunk to the first, with `erase` transposed: the pass of gradients.
    """
    entering, state, chunks = torch.empty_like(added), first, range(added.shape[2])
    for index in reversed(chunks) if backward else chunks:
        entering[:, :, index] = state
        new = decay[:, :, index] * state + added[:, :, index]
        if erase is not None:
            erased = erase[:, :, index]
            new = new - (erased.mT if backward else erased) @ state
        state = new
    return entering, state


def _compare(device: torch.device) -> None:
    """Raise ValueError where Triton's pass differs from the reference in fp64 by more than 1e-5.

    That is of the largest element, after 5 chunks. fp32 is off by 5e-7 there, three products in
    TF32 by as much, a single one by 4e-4.
    """
    from kernels import triton_state_pass  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    # No multiples of a tile; the largest tile too, which may not fit the chip.
    for k, decays, erases in ((24, 1, False), (24, 24, False), (24, 1, True), (100, 1, True)):
        sizes = ((1, 3, 5, k, 20), (1, 3, 5, decays, 1), (1, 3, 5, k, k), (1, 3, k, 20))
        added, decay, erase, first = (torch.randn(n, generator=generator).to(device) for n in sizes)
        erased = erase * k**-0.5 if erases else None
        for backward in (False, True):
            found = triton_state_pass.pass_states(added, decay, erased, first, backward=backward)
            exact = erased.double() if erased is not None else None
            wanted = eager_pass(
                added.double(), decay.double(), exact, first.double(), backward=backward
            )
            for a, b in zip(found, wanted, strict=True):
                error = float((a - b).abs().max() / b.abs().max())
                if not error < 1e-5:
                    raise ValueError(f"the pass over states is off by {error:.1e}: k={k}")
