"""Which evaluations a run makes at which step, and where their results go."""

import json
from pathlib import Path
from typing import Any

from runner.evaluate.config import EvalConfig
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained, cadence
from runner.records.fingerprint import evaluation_key

SCHEMA = 1


class Evaluations:
    """Validation and the further evaluations of `cfg`; `fingerprint` is that of the run that is evaluated."""

    def __init__(self, cfg: EvalConfig, fingerprint: str) -> None:
        self.cfg, self.fingerprint = cfg, fingerprint

    def validates(self, step: int, *, last: bool) -> bool:
        """Return whether the model is validated after `step`."""
        return last or step % self.cfg.every == 0

    def due(self, step: int, *, last: bool) -> bool:
        """Return whether anything is evaluated after `step`."""
        return self.validates(step, last=last) or bool(self._chosen(step, last=last))

    def validate(self, trained: Trained) -> dict[str, float]:
        """Return the values of validation."""
        from runner.evaluate.validation import validate  # noqa: PLC0415

        return validate(trained)

    def further(self, trained: Trained) -> dict[str, float]:
        """Run what is due at the step of `trained`; return its values.

        At the last step they also stand in evals/ under the evaluation's own name: it need not be made up for.
        """
        values: dict[str, float] = {}
        for name, evaluation in self._chosen(trained.step, last=trained.last).items():
            found = dict(evaluation.run(trained, trained.step))
            values |= found
            made_up_for = name in self.cfg.also and getattr(evaluation, "counts", True)
            if trained.last and trained.folder is not None and made_up_for:
                folder, step = trained.scored or (trained.folder, trained.step)
                write_values(folder, name, evaluation_key(folder.name, evaluation), step, found)
        return values

    def _chosen(self, step: int, *, last: bool) -> dict[str, Any]:
        chosen = {}
        for name, evaluation in self.cfg.further().items():
            every = cadence(evaluation)
            regular = (
                self.validates(step, last=last)
                if every == "validation"
                else bool(every and step % every == 0)
            )
            if last or regular:
                chosen[name] = evaluation
        return chosen


def file_of(run: Path, key: str) -> Path:
    """Return where the values of an evaluation stand in the folder of the run that it is of."""
    return run / "evals" / f"{key}.json"


def write_values(run: Path, name: str, key: str, step: int, values: dict[str, float]) -> None:
    """Write the values of the evaluation called `name` to evals/ of a run."""
    file = file_of(run, key)
    file.parent.mkdir(exist_ok=True)
    record = {"schema": SCHEMA, "evaluation": name, "step": step, "values": values, "scores": []}
    write_atomically(file, json.dumps(record, indent=1))
