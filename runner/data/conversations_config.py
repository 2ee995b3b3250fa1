"""The configs of conversations to train on; see `runner/data/conversations.py`."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.config import config, configs_of, execution, neutral
from runner.data.corpus import content_hash, source_hash
from runner.data.sources import SourceConfig, row_source
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import DataError

if TYPE_CHECKING:
    from runner.data.conversations import ConversationCorpus

Role = Literal["system", "user", "assistant", "tool"]
Layout = Literal["messages", "sharegpt", "alpaca", "gsm8k"]
_FIELD: dict[Layout, str] = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "output",
    "gsm8k": "answer",
}


@config
class ConversationSource:
    """Conversations in the rows of a file, a folder or a Hugging Face dataset.

    Args:
        layout: of a row. messages: {messages: [{role, content}]}. sharegpt: {conversations: [{from,
            value}]}. alpaca: {instruction, input, output}. gsm8k: {question, answer}, with
            calculator calls <<48/2=24>> in the answer.
        path: a .jsonl(.gz), .json (a list) or .parquet file, a folder of them, or a dataset's name.
        pattern: glob pattern of the files to read in a folder.
        subset, revision, hub_split: of a dataset; its revision must be pinned.
        repeats: how often an epoch visits each conversation.
        calculator: gsm8k: keep the calls; what the calculator answers (24>>) is no target. False
            removes them.
    """

    layout: Layout = "messages"
    path: str
    pattern: str = "*"
    subset: str | None = None
    revision: str | None = None
    hub_split: str = "train"
    repeats: int = 1
    calculator: bool = True

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1; drop the source instead")
        object.__setattr__(self, "path", str(self.rows_of().path))  # resolved: a job may move

    def rows_of(self) -> SourceConfig:
        """Return the source that reads the rows."""
        return row_source(
            self.path,
            field=_FIELD[self.layout],
            pattern=self.pattern,
            subset=self.subset,
            revision=self.revision,
            hub_split=self.hub_split,
        )

    def content_hash(self) -> str:
        """Return the hash of the rows' content and of what is made of them."""
        inner = content_hash(self.rows_of())
        made = f"{inner}:{self.layout}:{self.repeats}:{self.calculator}"
        return hashlib.sha256(made.encode()).hexdigest()[:32]

    def check_first_row(self) -> None:
        """Raise DataError if the first row of a local file is of another layout."""
        from runner.data.conversation_rows import conversations  # noqa: PLC0415

        if Path(self.path).exists() and self.rows_of().format != "hub":
            next(conversations(self), None)

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (place for messages, row); see `SourceConfig.rows`."""
        yield from self.rows_of().rows()


def check_roles(loss_on: tuple[Role, ...], *, bidirectional: bool) -> None:
    """Raise ValueError if no role is learnt, or one whose tokens see what follows."""
    if not loss_on:
        raise ValueError("loss_on is empty, nothing would be learnt; name a role: [assistant]")
    if bidirectional and loss_on != ("assistant",):
        raise ValueError(
            "bidirectional_prompt=true lets tokens of a user or a tool see what follows: they "
            f"cannot be learnt; use loss_on=[assistant], not {list(loss_on)}"
        )


@config
class ConversationsConfig:
    """Conversations, rendered by the tokenizer's own marks for roles, or its chat template.

    What the roles of `loss_on` say is learnt, and nothing else. Conversations are packed into the
    sequences; a token sees its own conversation only.

    Args:
        sources: where they are.
        loss_on: the roles whose turns are learnt, each with the token that ends it.
        bidirectional_prompt: tokens of a stretch that the assistant has not written see each other
            (prefix-LM); between stretches attention stays causal. The model must be of attention.
        val_fraction: share of the conversations held out for validation, by their hash.
        num_workers: loader processes (0: in the training process).
    """

    mask_documents: ClassVar[bool] = True
    reads_template: ClassVar[bool] = True

    sources: tuple[Any, ...] = configs_of(ConversationSource)
    loss_on: tuple[Role, ...] = neutral(("assistant",))
    bidirectional_prompt: bool = neutral(False)
    val_fraction: float = 0.05
    num_workers: int = execution(0)

    def __post_init__(self) -> None:
        check_roles(self.loss_on, bidirectional=self.bidirectional_prompt)
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        for index, source in enumerate(self.sources):
            if not hasattr(source, "rows"):
                raise ValueError(
                    f"sources.{index}={source!r} holds no conversations; give {{path: FILE, "
                    "layout: messages}"
                )
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in (0, 1)")

    def content_hash(self) -> list[str]:
        """Return the content hash of each source, in order."""
        return [source_hash(source) for source in self.sources]

    def check(self, tokenizer: Any, seq: int) -> None:
        """Raise ValueError for a kind of tokenizer that has no chat template, or a wrong layout."""
        for source in self.sources:
            try:
                if isinstance(source, ConversationSource):
                    source.check_first_row()
            except DataError as error:  # before a run, not in it
                raise ValueError(str(error)) from error
        if isinstance(tokenizer, TokenizerConfig) and tokenizer.kind not in ("folder", "dialogue"):
            raise ValueError(
                "data=conversations needs a tokenizer that marks roles or has a chat template, and "
                f"tokenizer.kind={tokenizer.kind} has neither; use init=hf:DIR, tokenizer=folder, "
                "or tokenizer=dialogue to train from nothing"
            )

    def build(
        self, tokenizer: Any, cache: Path, hashes: list[str] | None = None
    ) -> "ConversationCorpus":
        """Return the corpus; what is rendered and tokenised once is kept in `cache`."""
        from runner.data.conversations import prepare  # noqa: PLC0415

        return prepare(self, tokenizer, cache, hashes)
