"""The interface of launchers, and the terminal view that they update."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.live import Live

from runner.records.cells import Cell
from runner.views.table import LiveTable

if TYPE_CHECKING:
    from runner.launch.study import Study

_SHOW_EVERY_S = 0.5


class View:
    """The terminal during a launch: printed lines, and below them the live table."""

    def __init__(self, console: Console, live: Live, table: LiveTable) -> None:
        self.console, self.live, self.table = console, live, table
        self._shown = 0.0
        self._notices: list[str] = []

    def notify(self, line: str) -> None:
        """Print a line at the next refresh; a signal handler may call it."""
        self._notices.append(line)

    def print(self, line: str) -> None:
        """Print a line above the table."""
        self.console.print(line)

    def refresh(self) -> None:
        """Print what is to be said and update the table, the latter twice a second at most."""
        while self._notices:
            self.print(self._notices.pop(0))
        if time.monotonic() - self._shown >= _SHOW_EVERY_S:
            self.live.update(self.table.render())
            self._shown = time.monotonic()


class Backend(Protocol):
    """Runs cells: on this machine, or on a cluster.

    Args:
        memory_gb: host memory of the machine, None if unknown.
        waits: whether `run` waits for the end of the cells, or returns once they are submitted.
    """

    memory_gb: float | None
    waits: bool

    def record(self) -> dict[str, Any]:
        """Return JSON from which `last_backend` rebuilds this launcher."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Check that the resources of `cells` are to be had here.

        Raises:
            ConfigError: they are not; nothing has been written.
        """

    def prepare(self) -> None:
        """Start slow imports in the background; called before a launch that runs any cell."""

    def run(self, cells: list[Cell], again: tuple[str, ...], view: "View") -> None:
        """Run those of `cells` whose state is in `again`; return when none runs any more."""

    def run_study(self, study: "Study", view: "View") -> None:
        """Run the trials of a study; return when all are taken and none runs any more."""

    def leave(self) -> str:
        """On Ctrl-C: make `run` return; return a message on what becomes of the cells.

        A signal handler calls it, again at each further Ctrl-C.
        """
