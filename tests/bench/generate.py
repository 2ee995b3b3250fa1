"""Tokens/s of generation, ours against transformers' `generate`.

    python -m tests.bench.generate [--size 124M] [--compile]

Same weights, same prompts, greedy; decode and prefill apart, interleaved, minima over rounds; in
fp32 and in bf16 (weights too); the two texts are compared. --compile compiles the steps on both
sides.
"""

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from models.language_model import LanguageModel
from models.pretrained import load_pretrained
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from tests.bench.timing import interleaved

SIZES = {
    "10M": {"n_embd": 256, "n_layer": 8, "n_head": 8},
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
}
NEW, PROMPT = 48, 64


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
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**SIZES[given.size])).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_pretrained(Path(folder)).eval()
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
    rounds, context = given.rounds, PROMPT + NEW if given.compile else 1024
    fixed = {"cache_implementation": "static"} if given.compile else {}
    prompts = torch.randint(0, 50257, (batch, PROMPT))

    def mine(new: int) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=new, temperature=0.0)
        done = generate(
            ours,
            list(prompts),
            sampling,
            context=context,
            decode=lambda _: "",
            eos=None,
            compiled=given.compile,
        )
        return [one.ids for one in done]

    def other(new: int) -> list[list[int]]:
        done = theirs.generate(
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

    both = (mine, other)
    fills = interleaved({call: partial(call, 1) for call in both}, rounds).values()
    totals = interleaved({call: partial(call, NEW) for call in both}, rounds).values()
    a, b = (batch * (NEW - 1) / (total - fill) for total, fill in zip(totals, fills, strict=True))
    c, d = (batch * PROMPT / fill for fill in fills)
    kind = str(next(ours.parameters()).dtype).removeprefix("torch.")
    decode = f"{a:.1f} | {b:.1f} | {a / b:.2f}"
    prefill = f"{c:.0f} | {d:.0f} | {c / d:.2f}"
    return f"| {kind} | {batch} | {decode} | {prefill} | {mine(NEW) == other(NEW)} |"


if __name__ == "__main__":
    main()
