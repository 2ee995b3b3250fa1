"""Tokens/s, MFU and peak memory of one training step on a GPU: sequence 2048, bf16, compiled.

    make bench-gpu           or: python -m tests.bench.gpu [124m|950m] ...

Needs torch and jaxtyping only. FLOPs by models/flops.py (3 x forward, full attention); the peak is
the vendor's dense bf16 figure.
"""

import sys
import time

import torch

from models.decoder_config import DecoderConfig
from models.flops import training_flops
from models.precision_config import PrecisionConfig
from runner.machine.ranks import Ranks
from tests.bench.train import loop, our_loss

SEQ, VOCAB, STEPS = 2048, 50304, 20
SIZES = {  # conf/model/gpt2_124m.yaml and mobilellm_950m.yaml; batch of sequences
    "124m": (
        DecoderConfig(
            depth=12,
            width=768,
            num_heads=12,
            context_length=SEQ,
            norm="layernorm",
            positions="learned",
            activation="gelu",
            bias=True,
        ),
        16,
    ),
    "950m": (
        DecoderConfig(
            depth=22, width=1536, num_heads=24, num_kv_heads=6, qk_norm=True, hidden=6144
        ),
        8,
    ),
}


def main(sizes: list[str]) -> None:
    """Print a row for each size."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here")
    ranks = Ranks("cuda")
    peak = ranks.peak_flops("bf16")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for size in sizes:
        config, batch = SIZES[size]
        model = config.build(VOCAB, 0).to("cuda")
        recipe = PrecisionConfig(compute="bf16").build(ranks.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        step = loop(model, optimizer, our_loss(torch.compile(model), recipe))
        tokens = torch.randint(0, VOCAB, (batch, SEQ + 1), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for index in range(STEPS + 5):
            if index == 5:
                torch.cuda.synchronize()
                start = time.perf_counter()
            step(tokens)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / STEPS
        flops = training_flops(config.forward_flops_per_sequence(VOCAB, SEQ)[0]) * batch
        mfu = f"{flops / seconds / peak:.1%}" if peak else "peak unknown"
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(f"{size}: {batch * SEQ / seconds:,.0f} tokens/s, MFU {mfu}, peak {memory:.1f} GB")
        del model, optimizer, step


if __name__ == "__main__":
    main(sys.argv[1:] or list(SIZES))
