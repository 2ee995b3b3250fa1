"""The config of a measurement of speculative decoding."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from models.config import config
from runner.records.contracts import Inputs, Outcome

if TYPE_CHECKING:
    from runner.machine.ranks import Ranks
    from runner.records.cells import Cell
    from runner.records.journal import Journal


@config
class SpeculateWork:
    """Measure what a draft brings the model of the input named target, on held-out text of `data`.

    `model` is that of the draft, so that a stage matches it; nothing is trained. Output is
    rounds.json: of each temperature the rounds by (tokens proposed, tokens added).

    Args:
        draft: lookup or layers:N, see `runner.generate.drafts.make_draft` (None: the run of the
            input named draft).
        length: tokens that a draft proposes at a time.
        temperatures: of the text; 0 is greedy.
        texts: held-out texts that are continued, one after the other.
        prompt, tokens: ids that are read of each, and that are added.
    """

    outputs: ClassVar[tuple[str, ...]] = ("rounds.json",)

    draft: str | None = None
    length: int = 4
    temperatures: tuple[float, ...] = (0.0, 1.0)
    texts: int = 16
    prompt: int = 32
    tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("length", "texts", "prompt", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"work.{name}={getattr(self, name)} must be at least 1")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"work.temperatures={list(self.temperatures)} must be some, from 0")

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.speculate import speculate  # noqa: PLC0415

        return speculate(self, cell, inputs, journal, ranks)
