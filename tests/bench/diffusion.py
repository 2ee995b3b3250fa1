r"""Masked diffusion: tokens/s by sampler, block and cache beside decoding token by token; the step.

    python -m runner task=diffusion data=sum_lines data.sources.0.digits=1 model=gpt_nano \
        model.width=256 model.depth=4 model.num_heads=4 model.causal=false optim.lr=1e-3 \
        train.sequence_length=272 train.batch_size=8 train.steps=600
    python -m tests.bench.diffusion --depth 4 --texts 16 --run runs/FINGERPRINT

One text of `--tokens` after a prompt of 16, in fp32; interleaved, minima over rounds. Quality is
the part of the tokens that are those of the same sampler without cache and threshold, one token a
step: mean and 95% interval over `--texts` prompts; of random weights (without --run) it says
nothing about a trained model. With --run, of data=sum_lines, the prompts are lines of sums, and
`right` is the part of the lines written whose sums are right. CPU time is that of this process
alone, where others run beside it, and the ratios are of it. A training step is compared with one of
plain cross-entropy on the same model that is not causal.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels.philox import NoiseKey
from models.contract import for_inference, token_loss
from models.decoder_config import DecoderConfig
from runner.data.special_tokens import WithTokens
from runner.data.sum_lines import SumLinesConfig, is_right
from runner.data.tokenizers import ByteTokenizer
from runner.generate.denoise import Denoise
from runner.generate.denoising import Denoising
from runner.generate.generate import Completion, generate
from runner.generate.sampling import Sampling
from runner.learn.tasks.diffusion_config import DiffusionConfig
from runner.records.trained_model import load_model
from tests.bench.timing import interleaved

TOKENIZER = WithTokens(ByteTokenizer(), ["<mask>"])
PROMPT, BATCH = 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="folder of a trained run of task=diffusion")
    given = parser.parse_args()
    shape = DecoderConfig(width=given.width, depth=given.depth, num_heads=given.width // 64)
    vocab = TOKENIZER.vocab_size
    causal = for_inference(shape.build(vocab, 0).eval())
    model = _not_causal(shape).build(vocab, 0).eval()
    if given.run is not None:
        model = load_model(given.run)[0].eval()
    print(
        f"{torch.get_num_threads()} threads, {shape.num_parameters(vocab) / 1e6:.1f} M parameters"
    )
    print(_step_ratio(_not_causal(shape).build(vocab, 0), given.tokens, given.rounds))
    model = for_inference(model)
    draw = torch.Generator().manual_seed(0)
    prompts = list(torch.randint(97, 122, (given.texts, PROMPT), generator=draw))
    half, kept = given.tokens // 2, {"block": 32, "algorithm": "low_confidence"}
    if given.run is not None:
        prompts = _sum_prompts(given.texts)
    ways = {
        "entropy": {},
        "entropy, half the steps": {"steps": half},
        "low_confidence, block 32": kept,
        "low_confidence, block 32, prefix": kept | {"cache": "prefix"},
        "low_confidence, block 32, dual": kept | {"cache": "dual"},
        "low_confidence, block 32, threshold 0.9": kept | {"threshold": 0.9},
        "low_confidence, block 32, dual, threshold 0.9": kept | {"cache": "dual", "threshold": 0.9},
    }
    one = {
        name: partial(_fill, model, prompts[:1], given.tokens, how) for name, how in ways.items()
    }
    greedy = Sampling(max_new_tokens=given.tokens, temperature=0.0)
    one["token by token"] = partial(_decode, causal, prompts[:1], greedy)
    cpu: dict[str, float] = {}
    best = interleaved(
        {name: partial(_noting, cpu, name, call) for name, call in one.items()}, given.rounds
    )
    print("| sampler | tokens/s | of CPU time | of token by token | quality | 95% | right | 95% |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    texts: dict[frozenset[tuple[str, Any]], list[Completion]] = {}

    def written(how: dict[str, Any]) -> list[Completion]:
        key = frozenset(how.items())
        if key not in texts:
            texts[key] = _fill(model, prompts, given.tokens, how)
        return texts[key]

    for name, seconds in best.items():
        shown = [""] * 4
        if name in ways:
            base = {k: v for k, v in ways[name].items() if k in ("block", "algorithm")}
            done = written(ways[name])
            scores = [_alike(done, written(base), given.tokens)]
            if given.run is not None:
                scores.append(_right(done))
            told = [text for one in scores for text in _with_interval(one)]
            shown[: len(told)] = told
        rate, of_cpu = given.tokens / seconds, given.tokens / cpu[name]
        ratio = cpu["token by token"] / cpu[name]
        print(f"| {name} | {rate:.1f} | {of_cpu:.1f} | {ratio:.2f} | {' | '.join(shown)} |")


def _noting(cpu: dict[str, float], name: str, call: Callable[[], object]) -> None:
    """Call, and note the least CPU time of the process that a call of this name took, in s."""
    begun = time.process_time()
    call()
    cpu[name] = min(cpu.get(name, math.inf), time.process_time() - begun)


def _not_causal(shape: DecoderConfig) -> DecoderConfig:
    return DecoderConfig(
        width=shape.width, depth=shape.depth, num_heads=shape.num_heads, causal=False
    )


def _fill(
    model: Any, prompts: Sequence[torch.Tensor], tokens: int, how: dict[str, Any]
) -> list[Completion]:
    mask = TOKENIZER.token_ids["<mask>"]
    strategy = Denoise(model, context=PROMPT + tokens, decode=TOKENIZER.decode, mask=mask)
    settings = Denoising(max_new_tokens=tokens, ends=(), **how)
    return _decode(model, prompts, settings, strategy)


def _decode(
    model: Any, prompts: Sequence[torch.Tensor], how: Any, strategy: Any = None
) -> list[Completion]:
    tokens = how.max_new_tokens
    return generate(
        model,
        prompts,
        how,
        context=PROMPT + tokens,
        decode=TOKENIZER.decode,
        ends=(),
        strategy=strategy,
    )


def _alike(ours: Sequence[Completion], plain: Sequence[Completion], tokens: int) -> list[float]:
    """Return the part of equal tokens of each text."""
    pairs = zip(ours, plain, strict=True)
    return [sum(x == y for x, y in zip(a.ids, b.ids, strict=True)) / tokens for a, b in pairs]


def _sum_prompts(texts: int) -> list[torch.Tensor]:
    """Return beginnings of texts of sums, of another seed than the training data's."""
    (text,) = SumLinesConfig(lines=3 * texts, digits=1, data_seed=1 << 20).documents()
    lines = text.splitlines(keepends=True)
    begun = ("\n" + "".join(lines[3 * i : 3 * i + 3]) for i in range(texts))
    return [torch.from_numpy(TOKENIZER.encode(one).astype("int64"))[:PROMPT] for one in begun]


def _right(done: Sequence[Completion]) -> list[float]:
    """Return the part of the whole lines of each text that are right sums; 0 if there is none."""
    whole = [TOKENIZER.decode([*one.prompt, *one.ids]).split("\n")[3:-1] for one in done]
    return [sum(map(is_right, lines)) / max(1, len(lines)) for lines in whole]


def _with_interval(values: Sequence[float]) -> tuple[str, str]:
    """Return the mean and half of its 95% interval over texts."""
    given = torch.tensor(values, dtype=torch.float64)
    half_width = 1.96 * float(given.std()) / math.sqrt(len(given))
    return f"{float(given.mean()):.3f}", f"+-{half_width:.3f}"


def _step_ratio(model: Any, tokens: int, rounds: int) -> str:
    """Return what a training step takes, and its ratio to one of plain cross-entropy."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (BATCH, tokens + 1), generator=draw)
    index = torch.arange(BATCH)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "index": index}
    noise = NoiseKey(seed=0, step=0, samples=index)
    task = DiffusionConfig().build(model, TOKENIZER, {})

    def diffusion() -> None:
        task.count(batch)
        task.loss(model, batch, noise).total.backward()

    def plain() -> None:
        token_loss(model, batch["tokens"], batch["targets"], noise=noise).total.backward()

    cpu: dict[str, float] = {}
    steps = {"diffusion": diffusion, "plain": plain}
    best = interleaved(
        {name: partial(_noting, cpu, name, call) for name, call in steps.items()}, rounds
    )
    return (
        f"training step of {BATCH} x {tokens}: {1e3 * best['diffusion']:.1f} ms, plain "
        f"cross-entropy {1e3 * best['plain']:.1f} ms, ratio {best['diffusion'] / best['plain']:.3f}"
        f", of CPU time {cpu['diffusion'] / cpu['plain']:.3f}"
    )


if __name__ == "__main__":
    main()
