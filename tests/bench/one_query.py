"""A token in each row attending to its past: two products beside torch's fused kernel, fp32, CPU.

    python -m tests.bench.one_query [--rounds 20]

Six layers in turn, and between them as many weights are read as a layer of gpt_10m has: in a model
no keys are found in the cache either. One thread; ms a layer, minima of interleaved rounds.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import _one_query

SHAPES = [  # rows, heads, positions, dim
    (8, 6, 64, 64),
    (8, 6, 96, 64),
    (8, 6, 384, 64),
    (8, 6, 1024, 64),
    (4, 6, 96, 64),
    (2, 6, 96, 64),
    (1, 6, 96, 64),
    (8, 4, 96, 32),
    (8, 4, 96, 96),
    (8, 4, 96, 128),
    (8, 4, 96, 16),
]
LAYERS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    weights = [torch.randn(1_800_000) for _ in range(LAYERS)]
    print("| rows, heads, positions, dim | fused | products | ratio |")
    for shape in SHAPES:
        rows, heads, ctx, dim = shape
        layers = [
            (torch.randn(rows, heads, 1, dim), *torch.randn(2, rows, heads, ctx, dim))
            for _ in range(LAYERS)
        ]
        lengths = torch.randint(ctx // 2, ctx, (rows, 1))
        mask = (torch.arange(ctx) < lengths)[:, None, None]
        fused, products = float("inf"), float("inf")
        for _ in range(given.rounds):
            fused = min(fused, _spent(True, layers, mask, weights))
            products = min(products, _spent(False, layers, mask, weights))
        print(f"| {shape} | {fused:.3f} | {products:.3f} | {fused / products:.2f} |", flush=True)


def _spent(
    is_fused: bool, layers: list[tuple[Tensor, ...]], mask: Tensor, weights: list[Tensor]
) -> float:
    """Return the milliseconds that a layer takes."""
    spent = 0.0
    for (q, k, v), weight in zip(layers, weights, strict=True):
        weight.sum()
        begin = time.perf_counter()
        if is_fused:
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            _one_query(q * q.shape[-1] ** -0.5, k, v, ~mask)
        spent += time.perf_counter() - begin
    return 1e3 * spent / len(layers)


if __name__ == "__main__":
    main()
