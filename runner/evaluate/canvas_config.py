"""The configs of evaluations that let a model write: with several samplers, and in which order."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from models.config import config, execution, neutral
from runner.evaluate.config import Cadence
from runner.generate.denoising import ALGORITHMS
from runner.records.contracts import Trained


@config
class SamplersConfig:
    """How good texts are by sampler, judged by what is known of the data, or by another model.

    Args:
        judge: `chain`: nats per token under the chain of data=markov, whose entropy is the least
            that honest samples reach. `sums`: the part of the lines that are right, of
            data=sum_lines. `sudoku`: the part of the given puzzles that are solved, of data=sudoku,
            whose answers have 16 tokens. None: `judge_input` alone.
        judge_input: an input of the run, trained on next tokens of the same data, under which the
            nats per token of the texts are measured too (None: no model judges).
        algorithms, steps: of a model that fills in a canvas; each pair is measured. A model of next
            tokens is measured once.
        thresholds: each is measured too, by `low_confidence`: a step reveals every token of at
            least this probability.
        tokens: length of a text.
        texts: their number.
        temperature: 1 samples from the model as it is.
        every: steps between two, or "validation": with each validation (None: at the end).
    """

    judge: Literal["chain", "sums", "sudoku"] | None = "sums"
    judge_input: str | None = neutral(None)
    algorithms: tuple[str, ...] = ("random", "entropy")
    steps: tuple[int, ...] = (4, 16, 64)
    thresholds: tuple[float, ...] = neutral(())
    tokens: int = 64
    texts: int = 64
    temperature: float = 1.0
    every: Cadence = execution(None)

    def __post_init__(self) -> None:
        if self.judge is None and self.judge_input is None:
            raise ValueError(
                "judge=null needs a judge_input: name an input of the run that predicts next tokens"
            )
        unknown = [name for name in self.algorithms if name not in ALGORITHMS]
        if unknown:
            raise ValueError(
                f"algorithms={list(self.algorithms)}: {unknown[0]} is none of "
                f"{', '.join(ALGORITHMS)}"
            )
        outside = [least for least in self.thresholds if not 0 < least <= 1]
        if outside:
            raise ValueError(
                f"thresholds={list(self.thresholds)}: {outside[0]} is no probability in (0, 1]"
            )
        if not self.steps or not 1 <= min(self.steps) <= max(self.steps) <= self.tokens:
            raise ValueError(f"steps={list(self.steps)} must lie in 1 to tokens={self.tokens}")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `samples/nats@random_16`, or `samples/right@random_16`, and so on.

        Those of a threshold end in `@threshold_0.9`. `samples/passes_per_token@...` is the number
        of forward passes of a canvas, divided by its length; `samples/judge_nats@...` is that of
        `judge_input`; `samples/distinct@...` is the part of the 4-grams that are no repeats of
        others in their text. Each has its standard error over texts.
        """
        from runner.evaluate.canvas import measure_samplers  # noqa: PLC0415

        return measure_samplers(self, trained)


@config
class RevealOrdersConfig:
    """In which order a masked-diffusion model writes after each prompt: orders.json of the run.

    Args:
        prompts: texts that the canvas follows.
        samples: texts for each prompt.
        tokens: length of the canvas, as many steps.
        algorithm: which token is revealed next; see `runner.generate.denoising.Denoising`.
        temperature: divides the logits.
        every: steps between two, or "validation": with each validation (None: at the end).
    """

    counts: ClassVar[bool] = False

    prompts: tuple[str, ...] = ("\n",)
    samples: int = 8
    tokens: int = 64
    algorithm: str = "entropy"
    temperature: float = 0.1
    every: Cadence = execution(None)

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `orders`, the number of texts in orders.json: prompt and `revealed_at` of each."""
        from runner.evaluate.canvas import write_orders  # noqa: PLC0415

        return write_orders(self, trained)
