"""Budget forcing: thinking is cut at a number of tokens, or made to go on (s1, arXiv 2501.19393).

think     up to `think_end`, to the end of the text, or to the budget
wait      an end before the budget is replaced by `wait`, at most `waits` times
answer    after `think_end`, and after `final` where the thinking was cut
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runner.generate.generate import Completion
from runner.generate.sampling import Sampling

# Continues texts, given as ids; the samplings are one for each.
Continue = Callable[[Sequence[Sequence[int]], Sequence[Sampling]], Sequence[Completion]]


@dataclass(frozen=True, kw_only=True)
class BudgetForcing:
    """What thinking may cost, and the texts that steer it.

    Args:
        budget: the most tokens of thinking.
        think_end: ends the thinking; the answer follows it.
        wait: what the end of the thinking is replaced by.
        waits: how often.
        final: what precedes the answer where the thinking was cut.
        answer_tokens: the most tokens of the answer.
    """

    budget: int
    think_end: str
    wait: str = "Wait"
    waits: int = 0
    final: str = "Final Answer:"
    answer_tokens: int = 32


@dataclass
class Thought:
    """A text under way.

    Args:
        text: the thinking so far, then the answer too.
        spent: tokens that the model has generated.
        waits: how often it was made to go on.
        cut: whether its thinking was cut at the budget.
    """

    prompt: Sequence[int]
    sampling: Sampling
    text: str = ""
    spent: int = 0
    waits: int = 0
    cut: bool = False
    ids: list[int] = field(default_factory=list)


def think(
    continues: Continue,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    forcing: BudgetForcing,
) -> list[Thought]:
    """Return the thinking and the answer to each prompt.

    Args:
        samplings: how each is sampled; lengths and stops are those of `forcing`.
    """
    pairs = zip(prompts, samplings, strict=True)
    thoughts = [Thought(prompt, sampling) for prompt, sampling in pairs]
    going = list(thoughts)
    while going:
        left = [forcing.budget - thought.spent for thought in going]
        done = _continued(continues, going, left, stop=(forcing.think_end,))
        still = []
        for thought, completion in zip(going, done, strict=True):
            thought.cut = completion.finish == "length"
            goes_on = thought.waits < forcing.waits and thought.spent < forcing.budget
            if thought.cut or not goes_on:
                continue
            thought.waits += 1
            thought.text += forcing.wait
            still.append(thought)
        _encode(tokenizer, still)
        going = still
    for thought in thoughts:
        thought.text += forcing.think_end + (forcing.final if thought.cut else "")
    _encode(tokenizer, thoughts)
    _continued(continues, thoughts, [forcing.answer_tokens] * len(thoughts), stop=())
    return thoughts


def _continued(
    continues: Continue, thoughts: Sequence[Thought], tokens: Sequence[int], stop: tuple[str, ...]
) -> Sequence[Completion]:
    samplings = [
        # What follows a wait is drawn anew: the same key would repeat what was drawn before it.
        replace(
            thought.sampling,
            max_new_tokens=most,
            stop=stop,
            sample=thought.sampling.sample * 1024 + thought.waits + 512 * (not stop),
        )
        for thought, most in zip(thoughts, tokens, strict=True)
    ]
    done = continues([[*thought.prompt, *thought.ids] for thought in thoughts], samplings)
    for thought, completion in zip(thoughts, done, strict=True):
        thought.text += completion.text
        thought.spent += len(completion.ids)
    return done


def _encode(tokenizer: Any, thoughts: Sequence[Thought]) -> None:
    for thought in thoughts:
        thought.ids = [int(index) for index in tokenizer.encode(thought.text)]
