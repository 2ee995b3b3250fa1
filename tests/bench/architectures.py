"""All architectures at equal active parameters: tokens/s, peak memory, FLOPs, decoding.

    python -m tests.bench.architectures [--active 2e6] [--seq 256] [--batch 8] [--rounds 10]
                                        [--only dense,MQA]
    python -m tests.bench.architectures --bdh [--seq 2048]    BDH direct and in chunks
    python -m tests.bench.architectures --decode FILE         decoding by context length, as CSV

Steps (forward, backward, AdamW) are interleaved, minima over the rounds; memory is the peak of a
process each, less what torch takes for itself. The feed-forward width (of BDH the neurons, of
Mamba-2 the depth) is fitted to the active parameters; the last column is the speed of a FLOP.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from models.attention_config import AttentionConfig
from models.bdh_config import BDHConfig
from models.config import plain, target_class, thaw
from models.convolution_config import ConvolutionConfig
from models.decoder_config import DecoderConfig
from models.engram_config import EngramConfig
from models.experts_config import ExpertsConfig
from models.language_model import LanguageModel, ModelConfig
from models.linear_attention_config import LinearAttentionConfig
from models.mamba_config import MambaConfig
from models.min_gru_config import MinGRUConfig
from models.streams_config import StreamsConfig
from tests.bench.timing import interleaved

VOCAB = 257
BASE = DecoderConfig(depth=6, width=192, num_heads=6)


def mixer(part: Any, pattern: str = "xf", **more: Any) -> Callable[[int], ModelConfig]:
    """Return a function of the feed-forward width, in eights: the decoder with `part` as x."""
    return lambda hidden: replace(
        BASE, hidden=8 * hidden, pattern=pattern, parts={"x": part}, **more
    )


def experts(hidden: int) -> ModelConfig:
    """Return a decoder with eight experts of half the width each, two of them active."""
    part = ExpertsConfig(num_experts=8, hidden=4 * hidden)
    return replace(BASE, pattern="ax", parts={"x": part})


MODELS: dict[str, Callable[[int], ModelConfig]] = {
    "dense": lambda hidden: replace(BASE, hidden=8 * hidden),
    "GQA, 2 of 6": lambda hidden: replace(BASE, hidden=8 * hidden, num_kv_heads=2),
    "MQA": lambda hidden: replace(BASE, hidden=8 * hidden, num_kv_heads=1),
    "window 64": mixer(AttentionConfig(window=64)),
    "window 60 + 4 sinks, reindexed": mixer(AttentionConfig(window=60, sinks=4, reindex=True)),
    "learned sink": mixer(AttentionConfig(learned_sink=True)),
    "8 experts, top 2": experts,
    "Engram in 2 layers": mixer(EngramConfig(table_size=4096, slot_dim=8), "xaf af af"),
    "hyper-connections": lambda hidden: replace(
        BASE, hidden=8 * hidden, streams=StreamsConfig(kind="hc")
    ),
    "mHC": lambda hidden: replace(BASE, hidden=8 * hidden, streams=StreamsConfig()),
    "GLA": mixer(LinearAttentionConfig(kind="gla")),
    "DeltaNet": mixer(LinearAttentionConfig(kind="delta")),
    "gated DeltaNet": mixer(LinearAttentionConfig(kind="gated_delta")),
    "Based": mixer(LinearAttentionConfig(kind="based", key_dim=8)),
    "Mamba-2": lambda depth: replace(BASE, depth=depth, pattern="x", parts={"x": MambaConfig()}),
    "minGRU": mixer(MinGRUConfig()),
    "short convolution": mixer(ConvolutionConfig()),
    "long convolution": mixer(ConvolutionConfig(taps=256)),
    "BDH, public code": lambda n: BDHConfig(width=192, num_heads=6, multiplier=n * 3),
    "BDH, in 4 chunks": lambda n: BDHConfig(width=192, num_heads=6, multiplier=n * 3, chunks=4),
    "BDH, the paper's": lambda n: BDHConfig(width=192, num_heads=6, multiplier=n * 3, form="paper"),
}


DECODED: dict[str, Callable[[int], ModelConfig]] = {
    name: MODELS[name]
    for name in (
        "dense",
        "GQA, 2 of 6",
        "MQA",
        "window 64",
        "8 experts, top 2",
        "Engram in 2 layers",
        "mHC",
        "gated DeltaNet",
        "Mamba-2",
    )
} | {
    "hybrid": lambda hidden: replace(
        BASE,
        hidden=8 * hidden,
        pattern="ndf de af",
        streams=StreamsConfig(),
        parts={
            "n": EngramConfig(table_size=4096, slot_dim=8),
            "d": LinearAttentionConfig(kind="gated_delta"),
            "e": ExpertsConfig(num_experts=8, hidden=4 * hidden),
        },
    )
}


def fitted(make: Callable[[int], ModelConfig], active: float) -> ModelConfig:
    """Return the config whose active parameters are closest to `active`."""
    sizes = []
    for number in range(1, 200):
        try:
            cfg = make(number)
        except ValueError:
            continue
        sizes.append((abs(cfg.num_active_parameters(VOCAB) - active), cfg))
    return min(sizes, key=lambda pair: pair[0])[1]


def stepper(cfg: ModelConfig, batch: int, seq: int) -> Callable[[], None]:
    """Return a training step."""
    model: LanguageModel = cfg.build(VOCAB, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCAB, (batch, seq + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        out: Any = model(tokens[:, :-1], tokens[:, 1:])
        (out.total / tokens[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(cfg: ModelConfig, batch: int, seq: int) -> int:
    """Return the peak memory of two steps in a process of its own, without torch's own."""
    given = json.dumps([plain(cfg, target=True), batch, seq])
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.architectures", "--child"],
        input=given,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def child() -> None:
    """Print the peak memory of the model that standard input describes."""
    given, batch, seq = json.loads(sys.stdin.read())
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = resident_bytes("VmRSS")
    step = stepper(thaw(target_class(given.pop("_target_")), given), batch, seq)
    step()
    step()
    print(resident_bytes("VmHWM") - before)


def resident_bytes(what: str) -> int:
    """Return a memory size of this process (`resource` would count that of its parent too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise SystemExit("no /proc/self/status: memory is measured on Linux")


@torch.no_grad()
def decoding(active: float, contexts: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """Return ms per token and bytes of state of each model after each context length."""
    models = {name: fitted(make, active).build(VOCAB, 0) for name, make in DECODED.items()}
    text = torch.randint(0, VOCAB, (1, max(contexts)), generator=torch.Generator().manual_seed(0))
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    state_bytes = {}
    for context in contexts:
        for name, model in models.items():
            state = model.start(1, context)
            model(text[:, :context], state=state)
            state_bytes[name, context] = state.num_bytes()
            longer = model.start(1, context + rounds + 1)
            model(text[:, :context], state=longer)
            steps[name, context] = partial(model, text[:, :1], state=longer)
    best = interleaved(steps, rounds)
    return [
        {
            "model": name,
            "context": context,
            "ms_per_token": 1e3 * best[name, context],
            "state_bytes": num_bytes,
        }
        for (name, context), num_bytes in state_bytes.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--active", type=float, default=2e6)
    parser.add_argument("--seq", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="")
    parser.add_argument("--bdh", action="store_true")
    parser.add_argument("--decode", type=Path, metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child()
        return
    if given.decode:
        table = pd.DataFrame(decoding(given.active, (64, 256, 1024, 4096), 3 * given.rounds))
        table.to_csv(given.decode, index=False, float_format="%.4g")
        print(table.pivot(index="model", columns="context").round(3).to_string())
        return
    batch, seq = given.batch, given.seq or (2048 if given.bdh else 256)
    if given.bdh:
        batch = 1
        shape = BDHConfig(depth=2)  # the public width; two of its six levels fit in memory directly
        cfgs: dict[str, ModelConfig] = {
            f"BDH, {chunks} chunk{'s' * (chunks > 1)}": replace(shape, chunks=chunks)
            for chunks in (1, 2, 4, 8)
        }
    else:
        names = given.only.split(",") if given.only else MODELS
        cfgs = {name: fitted(MODELS[name], given.active) for name in names}
    best = interleaved({name: stepper(cfg, batch, seq) for name, cfg in cfgs.items()}, given.rounds)
    first = next(iter(best.values()))
    columns = ["model", "parameters", "active", "tokens/s", "relative time", "peak MB"]
    print(f"| {' | '.join([*columns, 'MFLOP/token', 'GFLOP/s'])} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, cfg in cfgs.items():
        flops = 3 * cfg.forward_flops_per_sequence(VOCAB, seq)[0]
        cells = [
            name,
            f"{cfg.num_parameters(VOCAB) / 1e6:.2f}M",
            f"{cfg.num_active_parameters(VOCAB) / 1e6:.2f}M",
            f"{batch * seq / best[name]:,.0f}",
            f"{best[name] / first:.2f}",
            f"{peak_bytes(cfg, batch, seq) / 1e6:,.0f}",
            f"{flops / seq / 1e6:.1f}",
            f"{flops * batch / best[name] / 1e9:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
