"""Beam search: an approximation of the most likely continuations of one prompt."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.at_least_fp32 import at_least_fp32
from models.contract import read
from models.language_model import LanguageModel
from runner.generate.decoding_batch import prefill
from runner.generate.generate import Completion
from runner.generate.request import Finish
from runner.generate.text_row import Decode
from runner.generate.text_stream import TextStream


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def score(self, penalty: float) -> float:
        total = sum(self.logprobs)
        return total / float(max(1, len(self.ids)) ** penalty)


@torch.no_grad()
def beam_search(
    model: LanguageModel,
    prompt: Tensor,
    *,
    beams: int,
    max_new_tokens: int,
    context: int,
    decode: Decode,
    ends: Collection[int],
    length_penalty: float = 1.0,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """Return `beams` continuations, the best first, by log-probability / length ** length_penalty.

    The token that ends a continuation counts in its score and is not among its ids. Stop
    strings cut the texts after the search. The search ends when `beams` continuations have ended
    and no unfinished one scores higher at its present length.

    Raises:
        ValueError: `beams` is below 1, the prompt is empty, or prompt and new tokens together
            exceed `context`.
    """
    if beams < 1:
        raise ValueError(f"beams={beams} must be at least 1")
    ids = prompt.tolist()
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    if len(ids) + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones pass the context of "
            f"{context}; a beam does not slide: ask for fewer tokens, or shorten the prompt"
        )
    running, ended = [_Beam((), ())], list[_Beam]()
    logits, state = prefill(model, [ids], capacity=len(ids) + max_new_tokens)
    device = logits.device
    for length in range(max_new_tokens):
        logprobs = torch.log_softmax(logits.cpu(), dim=-1)
        sums = logprobs + torch.tensor([sum(beam.logprobs) for beam in running])[:, None]
        best = sums.flatten().topk(min((1 + len(ends)) * beams, sums.numel()))
        rows: list[int] = []
        extended: list[_Beam] = []
        for index in best.indices.tolist():
            row, token = divmod(index, logprobs.shape[1])
            parent = running[row]
            logprob = float(logprobs[row, token])
            beam = _Beam((*parent.ids, token), (*parent.logprobs, logprob))
            if token in ends:
                ended.append(beam)
            elif len(extended) < beams:
                extended.append(beam)
                rows.append(row)
        ended = sorted(ended, key=lambda beam: -beam.score(length_penalty))[:beams]
        running = extended
        highest = max(beam.score(length_penalty) for beam in running)
        decided = len(ended) == beams and highest <= ended[-1].score(length_penalty)
        if length + 1 == max_new_tokens or decided:
            break
        newest = torch.tensor([[beam.ids[-1]] for beam in running], device=device)
        state = state.select(torch.tensor(rows, device=device))
        logits = at_least_fp32(read(model, newest, state))
    ranked = sorted([*ended, *running], key=lambda beam: -beam.score(length_penalty))[:beams]
    return [_completion(ids, beam, decode, ends, stop) for beam in ranked]


def _completion(
    prompt: list[int], beam: _Beam, decode: Decode, ends: Collection[int], stop: Sequence[str]
) -> Completion:
    complete = bool(beam.ids) and beam.ids[-1] in ends
    ids = list(beam.ids[:-1] if complete else beam.ids)
    stream = TextStream(decode, stop, prompt)
    for token in ids:
        stream.push(token)
        if stream.stopped:
            break
    stream.finish()
    finish: Finish = "stop" if complete or stream.stopped else "length"
    return Completion(
        prompt, ids[: len(stream.ids)], list(beam.logprobs[: len(stream.ids)]), stream.text, finish
    )
