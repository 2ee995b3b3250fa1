"""Sampling from a model, without a cache: each token costs a full forward pass over the context."""

import torch
from jaxtyping import Int64
from torch import Tensor

from models.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Int64[Tensor, " seq"],
    *,
    max_new_tokens: int,
    context: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop: int | None = None,
) -> Int64[Tensor, " total"]:
    """Return `prompt` and at most `max_new_tokens` more, ending early at the id `stop`.

    The model sees the last `context` tokens. `temperature=0` is greedy. Draws are made on the CPU
    from `generator`, so they do not depend on the device.

    Raises:
        ValueError: the prompt is empty.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token")
    ids = prompt
    for _ in range(max_new_tokens):
        logits = model(ids[None, -context:])
        assert isinstance(logits, Tensor)
        scores = logits[0, -1].float().cpu()
        if temperature == 0:
            choice = scores.argmax(keepdim=True)
        else:
            if top_k is not None:
                floor = scores.topk(min(top_k, scores.numel())).values[-1]
                scores = scores.masked_fill(scores < floor, -torch.inf)
            probabilities = torch.softmax(scores / temperature, dim=-1)
            choice = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat((ids, choice.to(ids.device)))
        if stop is not None and int(choice) == stop:
            break
    return ids
