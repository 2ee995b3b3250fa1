"""Training as a kind of work."""

from collections.abc import Callable

from runner.learn.trainer import Trainer
from runner.machine.ranks import Ranks
from runner.records import contracts
from runner.records.cells import Cell
from runner.records.contracts import Inputs, Outcome
from runner.records.journal import Journal
from runner.work.notes import note_environment, write_summary


def train(
    cell: Cell, inputs: Inputs, journal: Journal | None, ranks: Ranks, stop: Callable[[], bool]
) -> Outcome:
    """Train `cell` from its newest checkpoint to its budget, or until `stop` comes true.

    Return "finished", "diverged" or "interrupted".
    """
    trainer = Trainer(cell, inputs, journal, ranks)
    if journal is not None:
        judged = {"measure": contracts.measure(trainer.task)}
        facts = {"micro_batch": trainer.micro_batch, "backends": trainer.precision.backends}
        note_environment(journal, cell, ranks, **facts, **judged)
        write_summary(cell.folder, trainer.budget, trainer.precision, trainer.corpus.tokenizer)
    return trainer.fit(stop)
