"""Worked examples before a problem: training problems with their solutions, as ids."""

from collections.abc import Sequence

import torch

from runner.data.corpus import encode_with_special
from runner.data.problems import prompts_and_solutions
from runner.machine.errors import ConfigError
from runner.records.contracts import Trained

_BETWEEN = "\n\n"


class WorkedExamples:
    """The first problems of the training set in an order of their own, an empty line after each.

    Args:
        shots: how many.
        seed: of the order.

    Raises:
        ConfigError: they leave no room for a problem in the sequence.
    """

    def __init__(self, trained: Trained, shots: int, seed: int) -> None:
        seq, tokenizer = trained.cfg.train.sequence_length, trained.corpus.tokenizer
        self.begin = [int(i) for i in encode_with_special(tokenizer, "") if i != tokenizer.eos]
        self.ids: list[int] = list(self.begin)
        samples = trained.corpus.samples(seq, seed)
        drawn = [samples[index] for index in range(shots)]
        batch = {key: torch.stack([one[key] for one in drawn]) for key in drawn[0]}
        for prompt, solution in prompts_and_solutions(batch):
            text = [i for i in solution if i != tokenizer.eos]
            self.ids += [*self._without_begin(prompt), *text, *tokenizer.encode(_BETWEEN).tolist()]
        if len(self.ids) >= seq:
            raise ConfigError(
                f"{shots} worked examples are {len(self.ids)} tokens, and train.sequence_length="
                f"{seq}; raise it, or take fewer"
            )

    def before(self, prompt: Sequence[int]) -> list[int]:
        """Return the ids of a prompt after the examples."""
        return [*self.ids, *self._without_begin(prompt)]

    def _without_begin(self, prompt: Sequence[int]) -> list[int]:
        size = len(self.begin)
        return list(prompt[size:] if list(prompt[:size]) == self.begin else prompt)
