"""Tokens/s of generation, ours against transformers' `generate`.

    python -m tests.bench.generate [--size 124M] [--compile]

Same weights, same prompts, greedy; decode and prefill apart, interleaved, minima over rounds; in
fp32 and in bf16 (weights too); the two texts are compared. --compile compiles the steps on both
sides.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from models.language_model import LanguageModel
from models.pretrained import load_pretrained
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from tests.bench.timing import interleaved

SIZES = {
    "tiny": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "10M": {"n_embd": 256, "n_layer": 8, "n_head": 8},
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
}
NEW, PROMPT = 48, 64
Text = Callable[[int], list[list[int]]]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compiled steps, caches of fixed shape, on both sides",
    )
    given = parser.parse_args()
    ours, theirs = both_models(given.size)
    if given.compile:
        theirs.forward = torch.compile(theirs.forward)
    print(f"{given.size}, {NEW} new tokens after {PROMPT}, {torch.get_num_threads()} threads")
    sides = "ours | theirs | ratio"
    print(f"| dtype | batch | decode, {sides} | prefill, {sides} | same text |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            mine = copy.deepcopy(ours).to(dtype).for_inference(compiled=given.compile)
            print(compare(mine, theirs.to(dtype), batch, given), flush=True)


def compare(ours: LanguageModel, theirs: Any, batch: int, given: argparse.Namespace) -> str:
    """Return a row of the table, speeds in tokens/s."""
    prompts = torch.randint(0, 50257, (batch, PROMPT))
    both = (
        our_text(ours, prompts, compiled=given.compile),
        their_text(theirs, prompts, static=given.compile),
    )
    (a, c), (b, d) = speeds(both, batch, given.rounds)
    kind = str(next(ours.parameters()).dtype).removeprefix("torch.")
    decode = f"{a:.1f} | {b:.1f} | {a / b:.2f}"
    prefill = f"{c:.0f} | {d:.0f} | {c / d:.2f}"
    mine, other = both
    return f"| {kind} | {batch} | {decode} | {prefill} | {mine(NEW) == other(NEW)} |"


def our_text(model: LanguageModel, prompts: Tensor, *, compiled: bool) -> Text:
    """Return the greedy ids of each prompt as a function of their number."""
    context = PROMPT + NEW if compiled else 1024

    def text(new: int) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=new, temperature=0.0)
        done = generate(
            model,
            list(prompts),
            sampling,
            context=context,
            decode=lambda _: "",
            ends=(),
            compiled=compiled,
        )
        return [one.ids for one in done]

    return text


def their_text(model: Any, prompts: Tensor, *, static: bool) -> Text:
    """Return the same of transformers; `static`: with a cache of fixed shape."""
    fixed = {"cache_implementation": "static"} if static else {}

    def text(new: int) -> list[list[int]]:
        done = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **fixed,
        )
        ids: list[list[int]] = done[:, PROMPT:].tolist()
        return ids

    return text


def speeds(texts: Sequence[Text], batch: int, rounds: int) -> list[tuple[float, float]]:
    """Return (decoding, prefill) of each in tokens/s over all rows."""
    fills = interleaved({text: partial(text, 1) for text in texts}, rounds).values()
    totals = interleaved({text: partial(text, NEW) for text in texts}, rounds).values()
    return [
        (batch * (NEW - 1) / (total - fill), batch * PROMPT / fill)
        for total, fill in zip(totals, fills, strict=True)
    ]


def both_models(size: str) -> tuple[LanguageModel, Any]:
    """Return (ours, transformers' GPT-2) with the same random weights."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**SIZES[size])).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load_pretrained(Path(folder)).eval(), theirs


if __name__ == "__main__":
    main()
