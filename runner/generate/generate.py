"""Batched generation over a cache: prompts of any lengths, each with its own sampling parameters.

A finished row leaves the batch. When a row outgrows the training context, its last half is read
again and generation continues from there. A model without a state reads the full text per token.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.cache import State
from models.contract import read, start
from models.language_model import LanguageModel
from runner.generate.sampling import Sampling, choose
from runner.generate.text_stream import TextStream

Decode = Callable[[Sequence[int]], str]


@dataclass
class Completion:
    """The text generated for one prompt.

    Args:
        ids: the new tokens, without the one that ended the text.
        logprobs: of each new token, in nats, under the model's unmodified logits.
        text: the text of `ids` up to a stop string.
        finish: "stop" (a stop string or the end of the document) or "length".
    """

    prompt: Tensor
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: str = ""


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    sampling: Sampling | Sequence[Sampling],
    *,
    context: int,
    decode: Decode,
    ends: Collection[int],
    on_text: Callable[[int, str], None] | None = None,
    slide: bool = False,
    separate: bool = False,
    compiled: bool = False,
) -> list[Completion]:
    """Return a completion of each prompt.

    Args:
        prompts: ids, [seq] each.
        sampling: one for all prompts, or one for each.
        context: the most tokens that the model reads.
        decode: returns the text of ids.
        ends: the ids that end a text.
        on_text: called with (index of the prompt, piece of text) once a piece can no longer change.
        slide: truncate a prompt longer than `context` to its last tokens instead of refusing it.
        separate: decode the new tokens without their prompt, as lm-eval does: SentencePiece then
            drops a space before the first word.
        compiled: decode by a compiled step, with a batch of fixed size and a cache of `context`
            tokens.

    Raises:
        ValueError: a prompt is empty, or longer than `context` without `slide`.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    rows = []
    for index, (prompt, own) in enumerate(zip(prompts, samplings, strict=True)):
        ids = truncate_prompt(prompt, context, slide)
        stream = TextStream(decode, own.stop, () if separate else ids.tolist())
        rows.append(_Row(index, ids, own, stream))
    live = [row for row in rows if row.sampling.max_new_tokens > 0]
    device = next(model.parameters()).device
    state: State | None = None
    step = torch.compile(model, dynamic=False) if compiled else model
    while any(not row.done.finish for row in live):
        if state is None:
            texts = [row.tokens for row in live]
            logits, state = prefill(model, texts, device, static=context if compiled else None)
        else:
            newest = torch.tensor([row.tokens[-1:] for row in live], device=device)
            unread = [int(not row.done.finish) for row in live] if compiled else None
            counts = None if unread is None else torch.tensor(unread, device=device)
            logits = read(step, newest, state, counts=counts)
        for row, scores in zip(live, logits.float().cpu(), strict=True):
            if not row.done.finish:
                row.take(scores, ends, on_text)
        unfinished = [index for index, row in enumerate(live) if not row.done.finish]
        if len(unfinished) < len(live) and not compiled:
            live = [live[index] for index in unfinished]
            rows_left = torch.tensor(unfinished, device=device)
            state = state.select(rows_left) if live and state else None
        full = [row for row in live if len(row.tokens) > context]
        for row in full:
            row.tokens = row.tokens[-max(1, context // 2) :]
        state = None if full else state
    for row in rows:
        row.end(on_text)
    return [row.done for row in rows]


class _Row:
    """One request of the batch."""

    def __init__(self, index: int, prompt: Tensor, sampling: Sampling, stream: TextStream) -> None:
        self.index, self.prompt = index, prompt.tolist()
        self.sampling, self.stream = sampling, stream
        self.tokens = list(self.prompt)  # the model's context
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.done = Completion(prompt)

    def take(
        self, logits: Tensor, ends: Collection[int], on_text: Callable[[int, str], None] | None
    ) -> None:
        """Choose the next token; set `done.finish` if it is the last."""
        seen = [*self.prompt, *self.done.ids]
        token, logprob = choose(logits, seen, self.sampling, self.generator)
        if token in ends:
            self.done.finish = "stop"
            return
        self.done.ids.append(token)
        self.tokens.append(token)
        self.done.logprobs.append(logprob)
        self._emit(self.stream.push(token), on_text)
        if self.stream.stopped:
            self.done.finish = "stop"
        elif len(self.done.ids) >= self.sampling.max_new_tokens:
            self.done.finish = "length"

    def end(self, on_text: Callable[[int, str], None] | None) -> None:
        """Emit the text held back by the stream and complete `done`."""
        self._emit(self.stream.finish(), on_text)
        self.done.text = self.stream.text
        self.done.finish = self.done.finish or "length"

    def _emit(self, piece: str, on_text: Callable[[int, str], None] | None) -> None:
        if piece and on_text is not None:
            on_text(self.index, piece)


def truncate_prompt(prompt: Tensor, context: int, slide: bool) -> Tensor:
    """Return the prompt if it fits, with `slide` its last `context` tokens at most.

    Raises:
        ValueError: the prompt is empty, or longer than `context` without `slide`.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if prompt.numel() <= context:
        return prompt
    if slide:
        return prompt[-context:]
    raise ValueError(
        f"the prompt has {prompt.numel()} tokens, more than the context of {context}; shorten it, "
        "or let it slide (only the end is read)"
    )


def prefill(
    model: LanguageModel,
    texts: Sequence[list[int]],
    device: torch.device,
    static: int | None = None,
) -> tuple[Tensor, State]:
    """Read texts from the beginning; return the logits after each and the state to go on from.

    Args:
        texts: ids of each row, of any lengths.
        static: make the state for this many tokens, with a shape that never changes.

    Returns:
        Logits, [batch, vocab], and the state.
    """
    counts = torch.tensor([len(text) for text in texts], device=device)
    rows = [torch.tensor(text) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    capacity = 2 * padded.shape[1] if static is None else static
    state = start(model, len(texts), capacity, static=static is not None)
    return read(model, padded, state, counts=counts), state
