"""The one FLOP convention: a multiply-add is 2; training = 3 x forward; lookups count nothing.

A frozen matrix is 2 x forward where a gradient passes it, 1 x where none does (with adapters).
The output head counts. Attention is given twice: the full seq x seq product (the C of budgets and
scaling laws) and the causal half (what a fused kernel needs). Norms and activations are left out,
as `torch.utils.flop_counter.FlopCounterMode` leaves them out.
"""


def linear_flops(rows: int, d_in: int, d_out: int) -> int:
    """Return the FLOPs of `rows` vectors through a `d_in` x `d_out` matrix."""
    return 2 * rows * d_in * d_out


def attention_flops(seq: int, num_heads: int, head_dim: int) -> int:
    """Return the FLOPs of q k^T and p v of one sequence, all seq x seq pairs counted."""
    return 2 * linear_flops(seq, head_dim, seq) * num_heads


def training_flops(forward: int, *, frozen: int = 0, apart: int = 0) -> int:
    """Return forward + backward: one GEMM forward, two of the same size backward.

    Args:
        frozen: those of `forward` in products with frozen matrices that a gradient passes: one GEMM
            backward.
        apart: those that no gradient passes.
    """
    return 3 * forward - frozen - 2 * apart
