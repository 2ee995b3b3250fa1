"""The configs of answers to learn from: pairs of a better and a worse one, judged solutions.

What they hold is read in `judged_answer_rows.py` and rendered in `judged_answers.py`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.config import config, configs_of, execution
from runner.data.corpus import content_hash, needs_text, source_hash
from runner.data.sources import SourceConfig, row_source
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from runner.data.judged_answer_rows import Answer
    from runner.data.judged_answers import AnswerCorpus


@config
class AnswerSource:
    """What the sources of answers have in common; a kind of source has its own layouts.

    Args:
        path: a .jsonl(.gz), .json (a list) or .parquet file, a folder of them, or a dataset's name.
        pattern: glob pattern of the files to read in a folder.
        subset, revision, hub_split: of a dataset; its revision must be pinned.
        unusable: what is done with a row that nothing can be learnt from (no answer, two equal
            ones, an unknown label): it is refused, or dropped and counted.
    """

    field: ClassVar[str]  # of a row, that its null is looked for in
    layout: str
    path: str
    pattern: str = "*"
    subset: str | None = None
    revision: str | None = None
    hub_split: str = "train"
    unusable: Literal["refuse", "drop"] = "refuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.rows_of().path))  # resolved: a job may move

    def rows_of(self) -> SourceConfig:
        """Return the source that reads the rows."""
        return row_source(
            self.path,
            field=self.field,
            pattern=self.pattern,
            subset=self.subset,
            revision=self.revision,
            hub_split=self.hub_split,
        )

    def content_hash(self) -> str:
        """Return the hash of the rows' content and of what is made of them."""
        made = f"{content_hash(self.rows_of())}:{self.layout}:{self.unusable}"
        return hashlib.sha256(made.encode()).hexdigest()[:32]

    def check_first_row(self) -> None:
        """Raise DataError if the first row of a local file is of another layout."""
        local = Path(self.path).exists() and self.rows_of().format != "hub"
        if local and self.unusable == "refuse":
            next(self.examples(), None)

    def examples(self) -> "Iterator[tuple[Answer, ...] | None]":
        """Yield the answers of each row, None for a row that is dropped."""
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Yield (place for messages, row); see `SourceConfig.rows`."""
        yield from self.rows_of().rows()


@config
class PreferenceSource(AnswerSource):
    """Pairs of answers, of which one is preferred.

    Args:
        layout: of a row. pairs: {prompt, chosen, rejected}, each a text or messages [{role,
            content}]; without `prompt`, two conversations that differ in the last answer only.
            alpaca: {instruction, input, chosen, rejected}. hh: {chosen, rejected}, transcripts of
            "Human:" and "Assistant:".
        path, pattern, subset, revision, hub_split, unusable: see `AnswerSource`.
    """

    field: ClassVar[str] = "chosen"
    layout: Literal["pairs", "alpaca", "hh"] = "pairs"

    def examples(self) -> "Iterator[tuple[Answer, ...] | None]":
        """Yield (the chosen answer, the rejected one), None for a row that is dropped."""
        from runner.data.judged_answer_rows import examples, pair  # noqa: PLC0415

        yield from examples(self, pair)


@config
class SolutionSource(AnswerSource):
    """Answers and whether they are right.

    Args:
        layout: of a row. labelled: {prompt, answer, label}; a label is true, false or a number in
            [0, 1]. steps: {prompt, steps, labels}: lists of texts, joined by line breaks, and of
            their labels. pairs, alpaca, hh: see `PreferenceSource`; the chosen answer has the label
            1, the rejected one 0.
        path, pattern, subset, revision, hub_split, unusable: see `AnswerSource`.
    """

    field: ClassVar[str] = "prompt"
    layout: Literal["labelled", "steps", "pairs", "alpaca", "hh"] = "labelled"

    def examples(self) -> "Iterator[tuple[Answer, ...] | None]":
        """Yield the answers of a row, None for one that is dropped."""
        from runner.data.judged_answer_rows import examples, solution  # noqa: PLC0415

        yield from examples(self, solution)


@config
class JudgedAnswersConfig:
    """What data sets of answers have in common.

    Args:
        sources: where the rows are.
        form: of a text. chat: by the tokenizer's chat template. text: the prompt, the answer, and
            the token that ends a document.
        val_fraction: share of the examples held out for validation, by the hash of the prompt.
        num_workers: loader processes (0: in the training process).
    """

    sequences_per_sample: ClassVar[int]

    sources: tuple[Any, ...]
    form: Literal["chat", "text"] = "chat"
    val_fraction: float = 0.05
    num_workers: int = execution(0)

    @property
    def reads_template(self) -> bool:
        """Whether what is trained on hangs on the tokenizer's chat template."""
        return self.form == "chat"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        for index, source in enumerate(self.sources):
            if not hasattr(source, "examples"):
                raise ValueError(
                    f"sources.{index}={source!r} holds no answers; give {{path: FILE, "
                    "layout: NAME}"
                )
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in (0, 1)")

    def content_hash(self) -> list[str]:
        """Return the content hash of each source, in order."""
        return [source_hash(source) for source in self.sources]

    def check(self, tokenizer: Any, seq: int) -> None:
        """Refuse a wrong layout, a tokenizer made from text or without the template of form=chat.

        Raises:
            ValueError: one of these.
        """
        for source in self.sources:
            try:
                if isinstance(source, AnswerSource):
                    source.check_first_row()
            except DataError as error:  # before a run, not in it
                raise ValueError(str(error)) from error
        if needs_text(tokenizer):
            raise ValueError(
                f"tokenizer.kind={tokenizer.kind} is made from text, and answers are no sample of "
                "it; use tokenizer=bytes, or the folder of the model that the run starts from"
            )
        own = isinstance(tokenizer, TokenizerConfig) and tokenizer.kind != "folder"
        if self.form == "chat" and own:
            raise ValueError(
                f"data.form=chat needs a tokenizer with a chat template, and tokenizer.kind="
                f"{tokenizer.kind} has none; use init=hf:DIR, tokenizer=folder, or data.form=text"
            )

    def planned_batch(self, samples: int, seq: int) -> "dict[str, Tensor]":
        """Return a batch of zeros."""
        import torch  # noqa: PLC0415

        rows = (samples,) if self.sequences_per_sample == 1 else (samples, 2)
        tokens = torch.zeros(*rows, seq, dtype=torch.long)
        batch = {"tokens": tokens, "targets": tokens.clone(), "index": torch.zeros(samples).long()}
        if self.sequences_per_sample == 1:
            batch |= {"labels": tokens.float(), "step_ends": tokens.bool()}
        return batch

    def build(self, tokenizer: Any, cache: Path, hashes: list[str] | None = None) -> "AnswerCorpus":
        """Return the corpus; what is rendered and tokenised once is kept in `cache`."""
        from runner.data.judged_answers import prepare  # noqa: PLC0415

        return prepare(self, tokenizer, cache, hashes)


@config
class PreferencesConfig(JudgedAnswersConfig):
    """Pairs of answers to a prompt, each in a sequence of `train.sequence_length` tokens."""

    sequences_per_sample: ClassVar[int] = 2

    sources: tuple[Any, ...] = configs_of(PreferenceSource)


@config
class SolutionsConfig(JudgedAnswersConfig):
    """Answers with a label for each, or for each of their steps."""

    sequences_per_sample: ClassVar[int] = 1
    labelled: ClassVar[bool] = True

    sources: tuple[Any, ...] = configs_of(SolutionSource)
