"""The state of a model that keeps none: the text itself, which every pass reads anew.

Shape legend: batch, seq = new tokens, ctx = ids that there is room for.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor


class TextState:
    """The ids of each row; a `State`, see `models/cache.py`.

    Args:
        batch: rows.
        capacity: ids to make room for at first.
        static: never grow, and read as many tokens at every length: for a compiled step.
    """

    can_truncate = True

    def __init__(
        self, batch: int, *, capacity: int, device: torch.device, static: bool = False
    ) -> None:
        self.static = static
        self.ids = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    def append(
        self, tokens: Int64[Tensor, "batch seq"], counts: Int64[Tensor, " batch"] | None
    ) -> Int64[Tensor, "batch ctx"]:
        """Add the first `counts` tokens to each row (None: all); return the ids of all rows.

        Raises:
            ValueError: the state is static and has no room for the tokens of a row.
        """
        seq = tokens.shape[1]
        added = torch.full_like(self.lengths, seq) if counts is None else counts
        longest = self._grow(self.lengths + added)
        real = torch.arange(seq, device=tokens.device) < added[:, None]
        row, column = real.nonzero(as_tuple=True)
        self.ids[row, self.lengths[row] + column] = tokens[row, column]
        self.lengths = self.lengths + added
        return self.ids if self.static else self.ids[:, :longest]

    def _grow(self, lengths: Int64[Tensor, " batch"]) -> int:
        longest, capacity = max(lengths.tolist(), default=0), self.ids.shape[1]
        if longest > capacity:
            if self.static:
                raise ValueError(
                    f"a row of {longest} tokens does not fit a static state of {capacity}; start "
                    "one with a larger capacity"
                )
            self.ids = F.pad(self.ids, (0, max(longest, 2 * capacity) - capacity))
        return longest

    def compile_for_any_capacity(self) -> None:
        """See `models.cache.DecoderState`."""
        torch._dynamo.maybe_mark_dynamic(self.ids, 1)

    def select(self, rows: Int64[Tensor, " n"]) -> "TextState":
        """See `State`."""
        return self._with(self.ids[rows], self.lengths[rows])

    def put(self, rows: Int64[Tensor, " n"], other: "TextState") -> None:
        """See `State`."""
        if len(rows) != len(other.lengths):
            raise ValueError(
                f"{len(rows)} rows cannot be replaced by {len(other.lengths)}; give one for each"
            )
        longest = self._grow(other.lengths)
        self.ids[rows, :longest] = other.ids[:, :longest]
        self.lengths = self.lengths.index_copy(0, rows, other.lengths)

    def truncate(self, lengths: Int64[Tensor, " batch"]) -> None:
        """See `State`."""
        if bool(((lengths < 0) | (lengths > self.lengths)).any()):
            raise ValueError(
                f"rows of {self.lengths.tolist()} tokens cannot keep {lengths.tolist()}; keep as "
                "many as there are, or fewer"
            )
        self.lengths = lengths.clone()

    def to(self, device: torch.device) -> "TextState":
        """See `State`."""
        return self._with(self.ids.to(device, copy=True), self.lengths.to(device, copy=True))

    def num_bytes(self) -> int:
        """See `State`."""
        return self.ids.nbytes

    def _with(self, ids: Tensor, lengths: Tensor) -> "TextState":
        made = TextState(len(ids), capacity=0, device=ids.device, static=self.static)
        made.ids, made.lengths = ids, lengths
        return made
