"""LoRA fine-tuning and preference steps on SmolLM2-135M's shape, against plain loops.

    python -m tests.bench.posttrain sft [--rounds 3]       tokens/s of a step on conversations
    python -m tests.bench.posttrain sft --memory           peak resident memory, a process each
    python -m tests.bench.posttrain dpo [--rounds 3]       seconds of a step on pairs of answers
    OMP_NUM_THREADS=1 python -m tests.bench.posttrain dpo --rows 2 --cpu    beside other work

The peer is transformers' LlamaForCausalLM in a plain loop, with LoRA written here as peft computes
it (rank 8 on q and v, no dropout), fp32, the same batch, AdamW and clipping; its loss is the
cross-entropy of all logits. A third of the tokens are an answer. Of DPO it makes two separate
forward passes, of the chosen and the rejected answers, under the policy and, with its LoRA switched
off, under the reference; ours makes one of each. Weights are random; steps are interleaved, least
seconds over the rounds.
"""

import argparse
import os
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

from kernels.philox import NoiseKey
from models.adapter_config import AdapterConfig
from models.contract import token_loss
from models.decoder_config import DecoderConfig
from runner.learn.tasks.preference import Preference
from runner.learn.tasks.preference_config import PreferenceConfig
from tests.bench.timing import interleaved
from tests.bench.train import loop

VOCAB, SEQ, RANK, ALPHA, BETA = 49152, 256, 8, 16.0, 0.1
ANSWER = slice(SEQ - SEQ // 3, SEQ)
Step = Callable[[], None]
Make = Callable[[int], Step]


class Lora(nn.Module):
    """y = W x + s B A x, as peft computes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.switched_on = base, True
        self.a = nn.Linear(base.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.b(self.a(x)) * (ALPHA / RANK) if self.switched_on else y


def our_model() -> Any:
    """Return our decoder with LoRA on q and v."""
    adapter = AdapterConfig(rank=RANK, alpha=ALPHA, targets=("*.qkv.q", "*.qkv.v"))
    cfg = DecoderConfig(
        depth=30,
        width=576,
        num_heads=9,
        num_kv_heads=3,
        hidden=1536,
        context_length=8192,
        rope_base=100000.0,
        norm_eps=1e-5,
        adapter=adapter,
    )
    return cfg.build(VOCAB, 0)


def their_model() -> Any:
    """Return transformers' model with LoRA on q and v."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)))
    return model


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Return (tokens, targets) [rows, seq]; the last third of each row is the answer."""
    ids = torch.randint(0, VOCAB, (rows, SEQ + 1), generator=torch.Generator().manual_seed(0))
    targets = torch.full((rows, SEQ), -100)
    targets[:, ANSWER] = ids[:, 1:][:, ANSWER]
    return ids[:, :-1].contiguous(), targets


def _optimiser(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def our_sft(rows: int) -> Step:
    """Return a step of ours on conversations."""
    model, (tokens, targets) = our_model(), batch(rows)
    count = (targets >= 0).sum()
    step = loop(model, _optimiser(model), lambda t: token_loss(model, t, targets).total / count)
    return partial(step, tokens)


def their_sft(rows: int) -> Step:
    """Return a step of the plain loop on conversations."""
    model, (tokens, targets) = their_model(), batch(rows)

    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1).float(), targets.flatten())

    return partial(loop(model, _optimiser(model), loss), tokens)


def our_dpo(rows: int) -> Step:
    """Return a step of task=preference on pairs, the reference being the model without LoRA."""
    model, (tokens, targets) = our_model(), batch(rows)
    task = Preference(PreferenceConfig(reference="adapter"), model, None, {})
    index = torch.arange(rows // 2)
    pairs = {"tokens": tokens.view(-1, 2, SEQ), "targets": targets.view(-1, 2, SEQ), "index": index}

    def loss(_: Tensor) -> Tensor:
        noise = NoiseKey(seed=0, step=0, samples=index)
        (drawn,) = task.draw(model, [pairs], noise)
        return task.loss(model, drawn, None).total / len(index)

    return partial(loop(model, _optimiser(model), loss), tokens)


def their_dpo(rows: int) -> Step:
    """Return a step of a plain loop on pairs: chosen and rejected apart, four forward passes."""
    model, (tokens, targets) = their_model(), batch(rows)
    layers = [m for m in model.modules() if isinstance(m, Lora)]

    def logp(side: int) -> Tensor:
        labels = targets[side::2]
        scores = model(tokens[side::2]).logits.float().log_softmax(-1)
        chosen = scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (chosen * (labels >= 0)).sum(-1)

    def loss(_: Tensor) -> Tensor:
        for layer in layers:
            layer.switched_on = False
        with torch.no_grad():
            reference = logp(0) - logp(1)
        for layer in layers:
            layer.switched_on = True
        return -F.logsigmoid(BETA * (logp(0) - logp(1) - reference)).mean()

    return partial(loop(model, _optimiser(model), loss), tokens)


STEPS: dict[str, dict[str, Make]] = {
    "sft": {"ours": our_sft, "transformers": their_sft},
    "dpo": {"ours": our_dpo, "transformers": their_dpo},
}


def main() -> None:
    """Print the speed, or peak memory, of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=STEPS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a step, even for dpo")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor")
    parser.add_argument("--only", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        step = STEPS[given.what][given.only](given.rows)
        for _ in range(2):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    if given.memory:
        sizes = {}
        for name in STEPS[given.what]:
            command = [sys.executable, "-m", "tests.bench.posttrain", *sys.argv[1:], "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            sizes[name] = int(done.stdout.split()[-1])
            print(f"{given.what} {name:14s} {sizes[name] / 1e9:6.2f} GB peak resident")
        print(f"{given.what} ratio {sizes['ours'] / sizes['transformers']:.2f}")
        return
    steps = {name: make(given.rows) for name, make in STEPS[given.what].items()}
    clock = time.process_time if given.cpu else time.perf_counter
    best = interleaved(steps, given.rounds, clock)
    for name, seconds in best.items():
        print(
            f"{given.what} {name:14s} {seconds:7.2f} s {given.rows * SEQ / seconds:8.0f} tokens/s"
        )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{given.what} ratio {best['transformers'] / best['ours']:.2f}; load {load}")


if __name__ == "__main__":
    main()
