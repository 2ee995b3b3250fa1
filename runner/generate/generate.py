"""Generation: a batch of prompts of any lengths, each with its own wishes, over a cache.

A row that has ended leaves the batch. Where a row passes the context the model was trained at, the last half of
it is read anew and the text goes on from there. A model that keeps no state reads its whole text for each token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.cache import State
from models.contract import start
from models.language_model import LanguageModel
from runner.generate.sampling import Sampling, choose
from runner.generate.text_stream import TextStream

Decode = Callable[[Sequence[int]], str]


@dataclass
class Completion:
    """What was generated for a prompt.

    Args:
        ids: new tokens, the end-of-document token not among them; logprobs: of each, under the model's own logits.
        text: their text up to a stop string; finish: "stop" (a stop string or the end of the document) or
            "length".
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
    how: Sampling | Sequence[Sampling],
    *,
    context: int,
    decode: Decode,
    eos: int | None,
    on_text: Callable[[int, str], None] | None = None,
    slide: bool = False,
    compiled: bool = False,
) -> list[Completion]:
    """Return a completion of each prompt.

    Args:
        prompts: ids, [seq] each; how: one for all, or one for each.
        context: most tokens that the model looks at.
        decode: of ids, their text; eos: the id that ends a document (None: nothing does).
        on_text: called with (index of the prompt, piece of text) as text becomes certain.
        compiled: decode by a compiled step: the batch keeps its size and the cache its shape, `context`. Only for a
            model that keeps a state.
        slide: a prompt longer than `context` is cut to its end, instead of refused.

    Raises:
        ValueError: a prompt is empty, or longer than `context`.
    """
    wishes = [how] * len(prompts) if isinstance(how, Sampling) else list(how)
    rows = [
        _Row(index, fitting(prompt, context, slide), wish, TextStream(decode, wish.stop))
        for index, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True))
    ]
    live = [row for row in rows if row.how.max_new_tokens > 0]
    device = next(model.parameters()).device
    state: State | None = None
    step = torch.compile(model, dynamic=False) if compiled else model
    while any(not row.done.finish for row in live):
        if state is None:
            texts = [row.tokens for row in live]
            logits, state = read(model, texts, device, static=context if compiled else None)
        else:
            newest = torch.tensor([row.tokens[-1:] for row in live], device=device)
            unread = [int(not row.done.finish) for row in live] if compiled else None
            counts = None if unread is None else torch.tensor(unread, device=device)
            logits = step(newest, state=state, counts=counts)
        for row, scores in zip(live, logits.float().cpu(), strict=True):
            if not row.done.finish:
                row.take(scores, eos, on_text)
        going = [index for index, row in enumerate(live) if not row.done.finish]
        if len(going) < len(live) and not compiled:
            live = [live[index] for index in going]
            state = state.select(torch.tensor(going, device=device)) if live and state else None
        full = [row for row in live if len(row.tokens) > context]
        for row in full:
            row.tokens = row.tokens[-max(1, context // 2) :]
        state = None if full else state
    for row in rows:
        row.end(on_text)
    return [row.done for row in rows]


class _Row:
    """One request under way."""

    def __init__(self, index: int, prompt: Tensor, how: Sampling, stream: TextStream) -> None:
        self.index, self.prompt, self.how, self.stream = index, prompt.tolist(), how, stream
        self.tokens = list(self.prompt)  # what the model has before it
        self.generator = torch.Generator().manual_seed(how.seed)
        self.done = Completion(prompt)

    def take(
        self, logits: Tensor, eos: int | None, on_text: Callable[[int, str], None] | None
    ) -> None:
        """Choose the next token and see whether it is the last."""
        seen = [*self.prompt, *self.done.ids]
        token, logprob = choose(logits, seen, self.how, self.generator)
        if token == eos:
            self.done.finish = "stop"
            return
        self.done.ids.append(token)
        self.tokens.append(token)
        self.done.logprobs.append(logprob)
        self._say(self.stream.push(token), on_text)
        if self.stream.stopped:
            self.done.finish = "stop"
        elif len(self.done.ids) >= self.how.max_new_tokens:
            self.done.finish = "length"

    def end(self, on_text: Callable[[int, str], None] | None) -> None:
        """Hand out what was held back."""
        self._say(self.stream.finish(), on_text)
        self.done.text = self.stream.text
        self.done.finish = self.done.finish or "length"

    def _say(self, piece: str, on_text: Callable[[int, str], None] | None) -> None:
        if piece and on_text is not None:
            on_text(self.index, piece)


def fitting(prompt: Tensor, context: int, slide: bool) -> Tensor:
    """Return what of a prompt is read: all of it, or with `slide` its last `context` tokens; see `generate`."""
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if prompt.numel() <= context:
        return prompt
    if slide:
        return prompt[-context:]
    raise ValueError(
        f"the prompt has {prompt.numel()} tokens, more than the context of {context}; shorten it, or let it "
        "slide (only the end is read)"
    )


def read(
    model: LanguageModel,
    texts: Sequence[list[int]],
    device: torch.device,
    static: int | None = None,
) -> tuple[Tensor, State | None]:
    """Read texts anew; return the logits after each, and the state (None: the model keeps none).

    With `static` the state is made for so many tokens and keeps its shape.
    """
    counts = torch.tensor([len(text) for text in texts], device=device)
    rows = [torch.tensor(text) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    try:
        if static is not None:
            state = start(model, len(texts), static, static=True)
        else:
            state = start(model, len(texts), 2 * padded.shape[1])
    except NotImplementedError:
        whole = model(padded)
        assert isinstance(whole, Tensor)
        return whole[torch.arange(len(texts), device=device), counts - 1], None
    logits = model(padded, state=state, counts=counts)
    assert isinstance(logits, Tensor)
    return logits, state
