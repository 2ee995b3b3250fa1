"""The config of the evaluation `infilling`."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from models.config import config, execution, neutral
from runner.evaluate.config import Cadence
from runner.records.contracts import Trained


@config
class InfillingConfig:
    """Middles that a masked-diffusion model fills in, by the length of the canvas it begins with.

    Args:
        name: begins the names of the values, NAME/exact_match; differs from those of others.
        sums: so many sums whose result is the middle, instead of a file; the model is of
            data=sum_lines.
        digits: of each number of these sums, as in the data.
        file: JSON lines, plain or .gz. Rows of OpenAI's human-eval-infilling (`prompt`, `suffix`,
            `canonical_solution`, and with `test` and `entry_point` a program to run), or texts of
            Python (`text`), of whose functions one line each is held out. Its content is hashed,
            its path is not.
        canvases: numbers of masks to begin with.
        max_canvas: the longest canvas of a model that changes its length.
        limit: the most questions, evenly spaced through the file (None: all).
        temperature, top_p, steps: see `Denoising`.
        every: see `runner.records.contracts.Evaluation`.
        batch_size: texts at a time.
        allow_unsafe_code: run a model's programs even without a sandbox.
    """

    numerics = 2  # revision 1 compared the first line only, whatever the true middle was

    name: str = neutral("infilling")
    file: str | None = execution(None)
    sums: int = 0
    digits: int = neutral(2)
    canvases: tuple[int, ...] = (4, 8, 16, 32, 64)
    max_canvas: int = 64
    limit: int | None = None
    temperature: float = 0.2
    top_p: float | None = 0.9
    steps: int | None = None
    every: Cadence = execution(None)
    batch_size: int = execution(16)
    allow_unsafe_code: bool = execution(False)

    def __post_init__(self) -> None:
        if not self.canvases or min(self.canvases) < 1:
            raise ValueError(f"canvases={list(self.canvases)} must be numbers of at least 1")
        if self.max_canvas < 1:
            raise ValueError(f"max_canvas={self.max_canvas} must be at least 1")
        if self.digits < 1:
            raise ValueError(f"digits={self.digits} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")
        if (self.file is None) == (self.sums < 1):
            raise ValueError("give either file, or sums as the number of questions")
        if self.file is not None:
            object.__setattr__(self, "file", str(Path(self.file).expanduser().resolve()))

    def content_hash(self) -> str:
        """Return a hash of the file, part of the evaluation's fingerprint; "" without one."""
        if self.file is None:
            return ""
        with open(self.file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:32]

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return scores and standard errors by canvas, and the scores' means over the canvases.

        `NAME/exact_match@8` (where the true middle is a line, of the first line that is written;
        else of all but white space at its ends), `NAME/same_ast@8` (equal but for layout and
        comments), `NAME/length_error@8` (mean distance from the number of tokens), and where there
        are tests `NAME/pass_at_1@8`.
        """
        from runner.evaluate.infilling import infilling  # noqa: PLC0415

        return infilling(self, trained)
