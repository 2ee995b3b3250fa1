"""What a launcher of cells is, and what the person at the terminal sees meanwhile."""

import time
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.live import Live

from runner.records.cells import Cell
from runner.views.table import LiveTable

if TYPE_CHECKING:
    from runner.launch.study import Study

_SHOW_EVERY_S = 0.5


class View:
    """What the person at the terminal sees: lines, and below them the live table."""

    def __init__(self, console: Console, live: Live, table: LiveTable) -> None:
        self.console, self.live, self.table = console, live, table
        self._shown = 0.0

    def say(self, line: str) -> None:
        """Print a line above the table."""
        self.console.print(line)

    def tick(self) -> None:
        """Show the table as of now, a few times a second at most: it reads every cell."""
        if time.monotonic() - self._shown >= _SHOW_EVERY_S:
            self.live.update(self.table.render())
            self._shown = time.monotonic()


class Backend(Protocol):
    """Where cells run.

    Args:
        memory_gb: of its machine, None where it is not known.
        waits: whether `run` returns when the cells have ended, or as soon as they are under way.
    """

    memory_gb: float | None
    waits: bool

    def record(self) -> dict[str, Any]:
        """Return what makes the same backend again: `espalier retry` uses the last one."""

    def prepare(self) -> None:
        """Begin what takes time before the first cell: called once it is known that one will run."""

    def run(self, cells: list[Cell], again: tuple[str, ...], view: "View") -> None:
        """Run those of `cells` whose state is in `again` and return when none runs any more."""

    def run_study(self, study: "Study", view: "View") -> None:
        """Run the trials of a study until all are taken and none runs any more."""

    def leave(self) -> str:
        """Ctrl-C was pressed: make `run` return, and say what becomes of the cells."""
