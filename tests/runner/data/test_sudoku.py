"""Puzzles have one solution, by a search that knows the rules alone."""

from collections.abc import Iterator

import pytest

from runner.data.sudoku import SudokuConfig, is_solved


def _solutions(cells: str) -> Iterator[str]:
    at = cells.find(".")
    if at < 0:
        yield cells
        return
    row, column = divmod(at, 4)
    block = (row // 2, column // 2)
    seen = {
        cells[place]
        for place in range(16)
        if place // 4 == row or place % 4 == column or (place // 8, place % 4 // 2) == block
    }
    for digit in "1234":
        if digit not in seen:
            yield from _solutions(cells[:at] + digit + cells[at + 1 :])


def test_every_puzzle_has_the_solution_given_and_no_other() -> None:
    cfg = SudokuConfig(lines=60, min_blanks=5, max_blanks=12)
    lines = [f"{puzzle}={solution}" for puzzle, solution in cfg.puzzles()]
    for line in lines:
        puzzle, _, solution = line.partition("=")
        assert list(_solutions(puzzle)) == [solution]
        assert is_solved(line)
    assert {line[:16].count(".") for line in lines} == set(range(5, 13))
    (text,) = cfg.documents()
    assert text.splitlines() == lines
    assert lines != [f"{p}={s}" for p, s in SudokuConfig(lines=60, data_seed=1).puzzles()]


def test_grids_that_break_a_rule_or_a_given_cell_are_not_solved() -> None:
    puzzle, solution = ".21.....4...2..3", "3214143243212143"
    assert is_solved(f"{puzzle}={solution}")
    swapped = solution.translate(str.maketrans("12", "21"))  # a grid of another puzzle
    assert is_solved(f"{'.' * 16}={swapped}")
    for wrong in (swapped, solution[:-1] + "4", solution[:-1], solution + "1", ""):
        assert not is_solved(f"{puzzle}={wrong}")
    for line in (f"{puzzle[:-1]}={solution}", solution, "", "="):
        assert not is_solved(line)


@pytest.mark.parametrize("wrong", [{"lines": 0}, {"min_blanks": 0}, {"max_blanks": 13}])
def test_puzzles_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be"):
        SudokuConfig(**wrong)
