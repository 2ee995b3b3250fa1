"""Training speed beside a plain loop over transformers' GPT2LMHeadModel: same shape, batch, dtype.

    python tests/bench/train.py [10m|124m] [fp32|bf16] [rounds]

Eager against eager, steps interleaved, the minimum over the rounds of each; AdamW in both.
"""

import sys
import time
from collections.abc import Callable

import torch

from models.decoder import DecoderConfig
from models.language_model import TokenLoss
from models.precision import PrecisionConfig

SHAPES = {"10m": (6, 384, 6, 256, 8, 8192), "124m": (12, 768, 12, 512, 2, 50257)}


def ours(shape: str, precision: str) -> Callable[[torch.Tensor], None]:
    """Return one training step of our decoder in GPT-2's form."""
    depth, width, heads, seq, _, vocab = SHAPES[shape]
    model = DecoderConfig(
        depth=depth, width=width, num_heads=heads, context_length=seq, norm="layernorm",
        positions="learned", activation="gelu", bias=True,
    ).build(vocab, 0)  # fmt: skip
    recipe = PrecisionConfig(compute=precision).build(torch.device("cpu"))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: torch.Tensor) -> None:
        with recipe.autocast():
            out = model(tokens[:, :-1], tokens[:, 1:])
        assert isinstance(out, TokenLoss)
        (out.total / tokens[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(shape: str, precision: str) -> Callable[[torch.Tensor], None]:
    """Return one training step of transformers' model in the same loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    depth, width, heads, seq, _, vocab = SHAPES[shape]
    config = GPT2Config(vocab_size=vocab, n_positions=seq, n_embd=width, n_layer=depth, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)  # fmt: skip
    model = GPT2LMHeadModel(config)
    recipe = PrecisionConfig(compute=precision).build(torch.device("cpu"))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(tokens: torch.Tensor) -> None:
        with recipe.autocast():
            # Shift by hand: the model's own shift would drop one position of the batch.
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(shape: str = "10m", precision: str = "fp32", rounds: str = "10") -> None:
    """Print tokens/s of both and their ratio."""
    _, _, _, seq, batch, vocab = SHAPES[shape]
    tokens = torch.randint(0, vocab, (batch, seq + 1))
    steps = {"ours": ours(shape, precision), "transformers": theirs(shape, precision)}
    best = dict.fromkeys(steps, float("inf"))
    for index in range(int(rounds) + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(tokens)
            if index:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(f"{shape} {precision} {name:14s} {batch * seq / seconds:9,.0f} tokens/s")
    print(f"{shape} {precision} ratio {best['transformers'] / best['ours']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
