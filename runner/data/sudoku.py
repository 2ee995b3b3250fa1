"""Lines of 4x4 Sudoku as text, made from a seed: puzzles of one solution each, and the solution."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations, product

import numpy as np

from models.config import config

SIDE, CELLS = 4, 16
BLANK = "."


@config
class SudokuConfig:
    """Lines such as `.21.....4...2..3=3214143243212143`, in one document; a source.

    A grid is written row by row: the puzzle, with a dot for a cell to fill in, then `=` and its
    only solution.

    Args:
        lines: the number of lines.
        min_blanks, max_blanks: a puzzle has so many cells to fill in, drawn uniformly; with more
            than 12 no puzzle has one solution.
        data_seed: draws the puzzles.
        weight: share of the training samples, relative to the other sources.
    """

    lines: int = 20000
    min_blanks: int = 4
    max_blanks: int = 12
    data_seed: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.lines < 1:
            raise ValueError(f"lines={self.lines} must be at least 1")
        if not 1 <= self.min_blanks <= self.max_blanks <= 12:
            raise ValueError(
                f"min_blanks={self.min_blanks} and max_blanks={self.max_blanks} must be in 1 to "
                "12, the first at most the second"
            )

    def documents(self) -> Iterator[str]:
        """Yield the document."""
        yield "".join(f"{puzzle}={solution}\n" for puzzle, solution in self.puzzles())

    def puzzles(self) -> Iterator[tuple[str, str]]:
        """Yield (puzzle, solution) of each line, 16 characters each."""
        rng, grids = np.random.default_rng(self.data_seed), _grids()
        for _ in range(self.lines):
            blanks = rng.integers(self.min_blanks, self.max_blanks, endpoint=True)
            while True:
                grid = grids[rng.integers(len(grids))]
                given = rng.permutation(CELLS)[blanks:]
                if (grids[:, given] == grid[given]).all(axis=1).sum() == 1:
                    break
            puzzle = np.full(CELLS, BLANK)
            puzzle[given] = grid[given]
            yield "".join(puzzle), "".join(grid)


def is_solved(line: str) -> bool:
    """Return whether a line is a puzzle and a grid that solves it."""
    puzzle, equals, solution = line.partition("=")
    if not equals or len(puzzle) != CELLS or solution not in _solutions():
        return False
    return all(cell in (BLANK, answer) for cell, answer in zip(puzzle, solution, strict=True))


@lru_cache(maxsize=1)
def _solutions() -> frozenset[str]:
    return frozenset("".join(grid) for grid in _grids())


@lru_cache(maxsize=1)
def _grids() -> np.ndarray:
    """Return all 288 grids, [288, 16] of one character each."""
    rows = ["".join(digits) for digits in permutations("1234")]
    # Two rows fill two blocks, so that their left halves, and with them the right ones, differ.
    bands = [a + b for a, b in product(rows, rows) if not {*a[:2]} & {*b[:2]}]
    grids = [top + bottom for top, bottom in product(bands, bands)]
    return np.array([[*g] for g in grids if all(len({*g[i::SIDE]}) == SIDE for i in range(SIDE))])
