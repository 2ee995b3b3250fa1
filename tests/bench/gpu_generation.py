"""Decoding and prefill on a GPU in bf16, ours beside transformers.

python -m tests.bench.gpu_generation

Prints a row of JSON for each side: eager against eager, then our compiled step against
transformers' static cache, whose step is replayed as a CUDA graph. Without a GPU the model is tiny
and nothing is compiled: a rehearsal.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import torch

from tests.bench.generate import NEW, PROMPT, both_models, our_text, speeds, their_text

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SIZE, BATCHES, ROUNDS = ("124M", (1, 8), 3) if HAS_GPU else ("tiny", (2,), 1)


@torch.no_grad()
def sides() -> Iterator[dict[str, Any]]:
    """Yield the speeds of every side and batch."""
    ours, theirs = (model.to(DEVICE, torch.bfloat16) for model in both_models(SIZE))
    for fixed in (False, True):
        compiled = fixed and HAS_GPU  # transformers compiles by itself where the cache is static
        mine = copy.deepcopy(ours).for_inference(compiled=compiled)
        for batch in BATCHES:
            prompts = torch.randint(0, 50257, (batch, PROMPT), device=DEVICE)
            texts = {
                "ours": our_text(mine, prompts, compiled=compiled),
                "transformers": their_text(theirs, prompts, static=fixed),
            }
            for name, text in texts.items():
                ((decode, prefill),) = speeds([text], batch, ROUNDS)
                yield {
                    "side": name,
                    "mode": "compiled" if compiled else "static cache" if fixed else "eager",
                    "batch": batch,
                    "decode_tokens_per_s": round(decode, 1),
                    "prefill_tokens_per_s": round(prefill),
                    "same_text": text(NEW) == texts["ours"](NEW),
                }


if __name__ == "__main__":
    for row in sides():
        print(json.dumps(row), flush=True)
