"""Training steps on a GPU, ours beside a nanoGPT-form model and transformers.

python -m tests.bench.gpu_training 124m | 950m | precision

Prints a row of JSON for each side as soon as it is measured: tokens/s of the fastest step, MFU by
models/flops.py (3 x forward, full attention) on the vendor's dense bf16 peak, peak memory. bf16
autocast over fp32 weights, clipping and fused AdamW on every side. Without a GPU the models are
tiny and not compiled: a rehearsal.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from models.flops import training_flops
from runner.machine.ranks import Ranks
from tests.bench.plain_gpt import PlainGPT
from tests.bench.timing import interleaved
from tests.bench.train import loop
from tests.plain_nodes import shipped

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SEQ, VOCAB, ROUNDS = (2048, 50304, 15) if HAS_GPU else (32, 128, 1)
BATCHES = {"124m": 16, "950m": 4} if HAS_GPU else {"124m": 2, "950m": 2}
MODELS = {"124m": "gpt2_124m", "950m": "mobilellm_950m"}
PEERS = {size: ("ours", "nanoGPT form", "transformers") for size in MODELS}
# Emulated recipes, eager first: they need no compilation and are the reference of the compiled.
RECIPES = ("bf16", "fp8_current", "nvfp4")
Row = dict[str, Any]


def config(size: str) -> DecoderConfig:
    """Return the shipped config of a size at the length measured; a tiny one in a rehearsal."""
    cfg: DecoderConfig = replace(shipped("model", MODELS[size]), context_length=SEQ)
    if HAS_GPU:
        return cfg
    few, hidden = cfg.num_kv_heads and 1, cfg.hidden and 128
    return replace(cfg, depth=2, width=64, num_heads=2, num_kv_heads=few, hidden=hidden)


def compiled(forward: Any) -> Any:
    """Return `forward` under torch.compile, in a rehearsal `forward` itself."""
    return torch.compile(forward) if HAS_GPU else forward


def our_loss(model: Any, forward: Any, recipe: str) -> Callable[[Tensor], Tensor]:
    """Return the mean loss of our model in a training step under a recipe."""
    precision = shipped("precision", recipe).build(DEVICE)
    precision.prepare(model)

    def loss(tokens: Tensor) -> Tensor:
        precision.begin(0, 10)
        samples = torch.arange(len(tokens), device=DEVICE)
        noise = NoiseKey(seed=0, step=0, samples=samples) if precision.cfg.quantised else None
        with precision.autocast(noise):
            out = forward(tokens[:, :-1], tokens[:, 1:], noise=noise)
        total: Tensor = out.total / tokens[:, 1:].numel()
        return total

    return loss


def their_model(size: str) -> nn.Module:
    """Return transformers' model of the same shape: GPT-2, or Qwen3 for queries that are normed."""
    import transformers as hf

    cfg = config(size)
    if size == "124m":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCAB,
                n_positions=SEQ,
                n_embd=cfg.width,
                n_layer=cfg.depth,
                n_head=cfg.num_heads,
                use_cache=False,
                **drops,
            )
        )
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=cfg.width,
            intermediate_size=cfg.hidden_dim,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads,
            head_dim=cfg.width // cfg.num_heads,
            max_position_embeddings=SEQ,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def plain_model(size: str) -> nn.Module:
    """Return nanoGPT's form at a size's depth and width, with as many weights in its products.

    At 950M, whose attention shares keys and whose network is gated, its own network is wider (8,064
    instead of three matrices of 6,144), and nothing has a bias.
    """
    cfg = config(size)
    shape = (cfg.depth, cfg.width, cfg.num_heads, SEQ, VOCAB)
    if size == "124m":
        return PlainGPT(*shape)
    shared = cfg.width * (cfg.num_kv_heads or cfg.num_heads) // cfg.num_heads
    of_block = 2 * cfg.width * (cfg.width + shared) + 3 * cfg.width * cfg.hidden_dim
    return PlainGPT(*shape, hidden=of_block // (2 * cfg.width) - 2 * cfg.width, bias=False)


def side(name: str, size: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a model on the device and its mean loss in bf16."""
    cfg = config(size)
    if name == "ours":
        ours = cfg.build(VOCAB, 0).to(DEVICE)
        return ours, our_loss(ours, compiled(ours), "bf16")
    if name == "nanoGPT form":
        plain = plain_model(size).to(DEVICE)
        forward = compiled(plain)
        logits_loss = lambda tokens: forward(tokens[:, :-1], tokens[:, 1:])  # noqa: E731
    else:
        plain = their_model(size).to(DEVICE)
        forward = compiled(plain)

        def logits_loss(tokens: Tensor) -> Tensor:
            logits = forward(tokens[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return logits_loss(tokens)

    return plain, loss


def measure(model: nn.Module, loss: Callable[[Tensor], Tensor], size: str) -> Row:
    """Return the speed of a training step."""
    batch = BATCHES[size]
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    step = loop(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), loss)
    tokens = torch.randint(0, VOCAB, (batch, SEQ + 1), device=DEVICE)
    step(tokens)  # compiles
    seconds = interleaved({"": lambda: step(tokens)}, ROUNDS)[""]
    flops = training_flops(config(size).forward_flops_per_sequence(VOCAB, SEQ)[0]) * batch
    ranks = Ranks("auto")
    peak = ranks.peak_flops("bf16")
    return {
        "ms": round(1e3 * seconds, 2),
        "tokens_per_s": round(batch * SEQ / seconds),
        "mfu": round(flops / seconds / peak, 4) if peak else None,
        "peak_gb": round(ranks.peak_memory() / 1e9, 2),
    }


def peers(size: str) -> Iterator[Row]:
    """Yield the compiled bf16 step of every side."""
    for name in PEERS[size]:
        torch.compiler.reset()
        model, loss = side(name, size)
        yield {"model": size, "side": name, **measure(model, loss, size)}
        del model, loss
        _free_memory()


def precisions() -> Iterator[Row]:
    """Yield our 950M step under each recipe, eager, then compiled; emulated where not native."""
    for mode in ("eager", "compiled"):
        first = None
        for recipe in RECIPES:
            torch.compiler.reset()
            model = config("950m").build(VOCAB, 0).to(DEVICE)
            forward = compiled(model) if mode == "compiled" else model
            row = measure(model, our_loss(model, forward, recipe), "950m")
            first = first or row["ms"]
            relative = round(row["ms"] / first, 2)
            yield {"model": "950m", "recipe": recipe, "mode": mode, "x_bf16": relative, **row}
            del model, forward
            _free_memory()


def _free_memory() -> None:
    gc.collect()  # modules refer to each other in circles
    torch.cuda.empty_cache()


if __name__ == "__main__":
    for row in precisions() if sys.argv[1] == "precision" else peers(sys.argv[1]):
        print(json.dumps(row), flush=True)
