"""Training speed and memory against a plain loop over transformers' models of the same shape.

    python -m tests.bench.train 10m --precision fp32 --peer gpt2 [--compile] [--rounds 10]
    python -m tests.bench.train 124m --memory        peak resident memory, a process each
    OMP_NUM_THREADS=1 python -m tests.bench.train 10m --cpu     where others use the machine too

Same batch and dtype, eager against eager, compiled against compiled; steps are interleaved, minima
over the rounds. Both loops clip and use torch's fused AdamW. A third row is the limit of the
machine: the matrix products of a step and its attention, nothing else; `of limit` is the share of
its speed that a loop reaches.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoder_config import DecoderConfig
from models.language_model import TokenLoss
from models.precision import Precision
from models.precision_config import PrecisionConfig
from tests.bench.timing import interleaved

# depth, width, heads, sequence, batch, vocabulary
SHAPES = {"10m": (6, 384, 6, 256, 8, 8192), "124m": (12, 768, 12, 512, 2, 50257)}
FORMS = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
    "llama": {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "tied": False},
}
Step = Callable[[Tensor], None]


def recipe(precision: str) -> Precision:
    """Return our precision recipe; both loops autocast by it."""
    return PrecisionConfig(compute=precision).build(torch.device("cpu"))  # type: ignore[arg-type]


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor]
) -> Step:
    """Return one training step, the same for both."""

    def step(tokens: Tensor) -> None:
        loss(tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_loss(forward: Callable[..., Any], precision: Precision) -> Callable[[Tensor], Tensor]:
    """Return the mean loss of our models as a function of tokens."""

    def loss(tokens: Tensor) -> Tensor:
        with precision.autocast():
            out = forward(tokens[:, :-1], tokens[:, 1:])
        assert isinstance(out, TokenLoss)
        return out.total / tokens[:, 1:].numel()

    return loss


def ours(given: argparse.Namespace) -> Step:
    """Return one training step of our decoder."""
    depth, width, heads, seq, _, vocab = SHAPES[given.shape]
    form = FORMS[given.peer]
    model = DecoderConfig(
        depth=depth, width=width, num_heads=heads, context_length=seq, **form
    ).build(vocab, 0)  # type: ignore[arg-type]
    forward = torch.compile(model) if given.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return loop(model, optimizer, our_loss(forward, recipe(given.precision)))


def theirs(given: argparse.Namespace) -> Step:
    """Return one training step of transformers' model in the same loop."""
    import transformers as hf

    depth, width, heads, seq, _, vocab = SHAPES[given.shape]
    if given.peer == "gpt2":
        config = hf.GPT2Config(
            vocab_size=vocab,
            n_positions=seq,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        model = hf.GPT2LMHeadModel(config)
    else:
        hidden = DecoderConfig(depth=1, width=width, num_heads=heads).hidden_dim
        config = hf.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=seq,
            use_cache=False,
        )
        model = hf.LlamaForCausalLM(config)
    precision = recipe(given.precision)
    forward = torch.compile(model) if given.compile else model

    def loss(tokens: Tensor) -> Tensor:
        with precision.autocast():
            # Shift by hand: the model's own shift would drop one position of the batch.
            logits = forward(tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return loop(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), loss)


def limit(given: argparse.Namespace) -> Step:
    """Return the products of one training step, forward and backward, and its attention alone."""
    depth, width, heads, seq, batch, vocab = SHAPES[given.shape]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.precision]
    form = FORMS[given.peer]
    hidden = DecoderConfig(depth=1, width=width, num_heads=heads, **form).hidden_dim  # type: ignore[arg-type]
    gated = 3 if form["activation"] == "swiglu" else 2
    shapes = [(width, 3 * width), (width, width)] + [(width, hidden)] * gated
    rows = batch * seq
    products = [(depth, *_operands(rows, *shape, dtype)) for shape in shapes]
    products.append((1, *_operands(rows, width, vocab, dtype)))
    shape = (batch, heads, seq, width // heads)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))

    def step(_: Tensor) -> None:
        for count, x, w, g in products:
            for _ in range(count):
                x @ w, g @ w.T, x.T @ g
        for _ in range(depth):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), out.detach())

    return step


def _operands(rows: int, width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, w and the gradient of x @ w."""
    made = (torch.randn(shape, dtype=dtype) for shape in ((rows, width), (width, out), (rows, out)))
    x, w, g = made
    return x, w, g


def peak_memory(given: argparse.Namespace) -> None:
    """Print this process's peak resident memory after three steps of `given.only`."""
    _, _, _, seq, batch, vocab = SHAPES[given.shape]
    step = {"ours": ours, "transformers": theirs}[given.only](given)
    for _ in range(3):
        step(torch.randint(0, vocab, (batch, seq + 1)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Print tokens/s, or peak memory, of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--peer", choices=FORMS, default="gpt2")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="by CPU time, on a busy machine")
    parser.add_argument("--only", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        peak_memory(given)
        return
    mode = f"{given.shape} {given.precision} {'compiled' if given.compile else 'eager'}"
    if given.memory:
        sizes = {}
        for name in ("ours", "transformers"):
            command = [sys.executable, "-m", "tests.bench.train", *sys.argv[1:], "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            sizes[name] = int(done.stdout.split()[-1])
            label = name if name == "ours" else f"{name} {given.peer}"
            print(f"{mode} {label:20s} {sizes[name] / 1e9:6.2f} GB peak resident")
        print(f"{mode} ratio {sizes['ours'] / sizes['transformers']:.2f}")
        return
    _, _, _, seq, batch, vocab = SHAPES[given.shape]
    tokens = torch.randint(0, vocab, (batch, seq + 1))
    peer = f"transformers {given.peer}"
    steps = {"ours": ours(given), peer: theirs(given), "products, attention": limit(given)}
    for step in steps.values():  # a second round before the measured ones, which compiles
        step(tokens)
    clock = time.process_time if given.cpu else time.perf_counter
    calls = {name: partial(step, tokens) for name, step in steps.items()}
    best = interleaved(calls, given.rounds, clock)
    least = best["products, attention"]
    for name, seconds in best.items():
        speed = f"{batch * seq / seconds:9,.0f} tokens/s"
        print(f"{mode} {name:20s} {speed} {least / seconds:5.0%} of limit")
    print(f"{mode} ratio {best[peer] / best['ours']:.2f}, at most {best[peer] / least:.2f}")


if __name__ == "__main__":
    main()
