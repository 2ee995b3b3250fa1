"""How a tokenizer writes dialogues: by marks of its own for the roles, or by its chat template.

    marks      <user> question <assistant> call <tool> value <assistant> answer eos
    template   as the chat template says; a call is a turn of the assistant like any other

What a tool says is encoded without special tokens, so that nothing in it can end its turn.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from runner.data.chat_template import ChatTemplate, Literals, Message, template_of
from runner.data.conversation_rows import Conversation, parts_of_answer
from runner.data.corpus import encode_literally, end_ids, token_id
from runner.machine.errors import ConfigError, DataError

ROLES = ("user", "assistant", "tool")
MARKS = tuple(f"<{role}>" for role in ROLES)
_PLACE = "\u2603"  # stands for what a tool says, where a template is asked for what is around it


@runtime_checkable
class DialogueFormat(Protocol):
    """A way to write dialogues in ids."""

    def render(
        self, messages: Sequence[Message], *, where: str = "a dialogue", calls: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a whole dialogue, and of each whether it is learnt.

        Args:
            where: its place, for messages of errors.
            calls: whether what stands after "=" in "<<48/2=24>>" of an answer is not learnt.

        Raises:
            DataError: it cannot write a role.
        """

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a dialogue up to where the assistant begins to speak."""

    def ends_call(self, index: int) -> bool:
        """Return whether a turn of the assistant that ends with id `index` may be a call."""

    @property
    def marks_calls(self) -> bool:
        """Whether a turn that ends so is a call whatever it says."""

    def around_answer(self) -> tuple[list[int], list[int]]:
        """Return the ids between a call and what the tool says, and from there to the next turn."""


def dialogue_format(tokenizer: Any, loss_on: Sequence[str] = ("assistant",)) -> DialogueFormat:
    """Return how a tokenizer writes dialogues.

    Args:
        loss_on: the roles whose turns are learnt, each with the token that ends it.

    Raises:
        ConfigError: the tokenizer has neither marks nor a chat template.
    """
    if all(token_id(tokenizer, mark) is not None for mark in MARKS):
        return MarkedDialogues(tokenizer, loss_on)
    if template_of(tokenizer) is None:
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__}) has neither marks for the roles of a "
            "dialogue nor a chat template; use tokenizer=dialogue, or tokenizer=folder with the "
            "folder of a model that was trained for conversations"
        )
    return TemplateDialogues(tokenizer, loss_on)


def given_spans(learnt: np.ndarray) -> np.ndarray:
    """Return an id for each token, the same along each stretch that is not learnt, 0 elsewhere."""
    begins = np.diff(np.concatenate([[True], learnt]).astype(np.int64)) == -1
    return np.where(learnt, 0, np.cumsum(begins))


class MarkedDialogues:
    """Dialogues of a tokenizer with a mark for each role; see `DialogueFormat`."""

    marks_calls = True

    def __init__(self, tokenizer: Any, loss_on: Sequence[str]) -> None:
        self.tokenizer, self.loss_on = tokenizer, frozenset(loss_on)
        self.marks = {role: int(tokenizer.token_ids[f"<{role}>"]) for role in ROLES}

    def render(
        self, messages: Sequence[Message], *, where: str = "a dialogue", calls: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `DialogueFormat`."""
        ids: list[int] = []
        learnt: list[bool] = []
        ended = False  # whether the mark of this turn ends one that is learnt
        for message in messages:
            role = message["role"]
            if role not in self.marks:
                raise DataError(
                    f"{where}: tokenizer=dialogue has no mark for role={role}; its roles are: "
                    f"{', '.join(ROLES)}"
                )
            ids.append(self.marks[role])
            learnt.append(ended)
            ended = role in self.loss_on
            for text, given in parts_of_answer(
                message["content"], calls=calls and role == "assistant"
            ):
                own = encode_literally(self.tokenizer, text).tolist()
                ids += own
                learnt += [ended and not given] * len(own)
        return np.array([*ids, self.tokenizer.eos]), np.array([*learnt, ended])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """See `DialogueFormat`."""
        return [*self.render(messages)[0][:-1].tolist(), self.marks["assistant"]]

    def ends_call(self, index: int) -> bool:
        """See `DialogueFormat`."""
        return index == self.marks["tool"]

    def around_answer(self) -> tuple[list[int], list[int]]:
        """See `DialogueFormat`."""
        return [], [self.marks["assistant"]]


class TemplateDialogues:
    """Dialogues of a tokenizer with a chat template; see `DialogueFormat`."""

    marks_calls = False

    def __init__(self, tokenizer: Any, loss_on: Sequence[str]) -> None:
        from runner.data.conversations import Renderer  # noqa: PLC0415

        self.tokenizer, self.template = tokenizer, ChatTemplate(tokenizer)
        self.ends, self._renderer = end_ids(tokenizer), Renderer(tokenizer, loss_on)

    def render(
        self, messages: Sequence[Message], *, where: str = "a dialogue", calls: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `DialogueFormat`."""
        rendered = self._renderer.render(Conversation(where, tuple(messages), calls))
        return rendered.ids, rendered.learnt

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """See `DialogueFormat`."""
        literals = Literals(self.tokenizer)
        hidden = [literals.hide(dict(message)) for message in messages]
        text = self.template.render(hidden, add_generation_prompt=True)
        return literals.ids(self.tokenizer, text)

    def ends_call(self, index: int) -> bool:
        """See `DialogueFormat`."""
        return index in self.ends

    def around_answer(self) -> tuple[list[int], list[int]]:
        """See `DialogueFormat`.

        Raises:
            ConfigError: the chat template does not write what a tool says.
        """
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        said = self.template.render(before)
        more = [*before, {"role": "tool", "content": _PLACE}]
        whole = self.template.render(more, add_generation_prompt=True)
        around = whole.removeprefix(said).split(_PLACE)
        if len(around) != 2 or not whole.startswith(said):
            raise ConfigError(
                "the tokenizer's chat template leaves out what a tool says; take one that writes "
                "messages of role tool"
            )
        # The turn has ended with its own token: what the template writes after it is ours to add.
        ids = self.tokenizer.encode(said).tolist()
        last = max((place for place, index in enumerate(ids) if index in self.ends), default=-1)
        head, tail = (self.tokenizer.encode(text).tolist() for text in around)
        return [*ids[last + 1 :], *head], tail
