"""The evaluations that are due at a step, and the files of their results."""

import json
from pathlib import Path
from typing import Any

from runner.evaluate.config import EvalConfig
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained, cadence
from runner.records.fingerprint import evaluation_key

SCHEMA = 1


class Evaluations:
    """Validation and the further evaluations of `cfg`, for the run of `fingerprint`."""

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg

    def validates(self, step: int, *, last: bool) -> bool:
        """Return whether validation is due after `step`."""
        return last or step % self.cfg.every == 0

    def due(self, step: int, *, last: bool) -> bool:
        """Return whether any evaluation is due after `step`."""
        return self.validates(step, last=last) or bool(self._due(step, last=last))

    def validate(self, trained: Trained) -> dict[str, float]:
        """Return the values of validation."""
        from runner.evaluate.validation import validate  # noqa: PLC0415

        return validate(trained)

    def further(self, trained: Trained) -> dict[str, float]:
        """Run the evaluations due at the step of `trained`; return their values.

        At the last step those of `eval.also` are also written to evals/, each under its own key:
        planning then sees that they need not be run again.
        """
        values: dict[str, float] = {}
        for name, evaluation in self._due(trained.step, last=trained.last).items():
            own_values = dict(evaluation.run(trained, trained.step))
            values |= own_values
            has_own_key = name in self.cfg.also and getattr(evaluation, "counts", True)
            if trained.last and trained.folder is not None and has_own_key:
                folder, step = trained.scored or (trained.folder, trained.step)
                key = evaluation_key(folder.name, evaluation)
                write_values(folder, name, key, step, own_values)
        return values

    def _due(self, step: int, *, last: bool) -> dict[str, Any]:
        due = {}
        for name, evaluation in self.cfg.further().items():
            every = cadence(evaluation)
            if every == "validation":
                at_step = self.validates(step, last=last)
            else:
                at_step = bool(every and step % every == 0)
            if last or at_step:
                due[name] = evaluation
        return due


def file_of(run: Path, key: str) -> Path:
    """Return the file of an evaluation's values in the folder of the run evaluated."""
    return run / "evals" / f"{key}.json"


def write_values(run: Path, name: str, key: str, step: int, values: dict[str, float]) -> None:
    """Write the values of the evaluation `name` at `step` to evals/ of a run."""
    file = file_of(run, key)
    file.parent.mkdir(exist_ok=True)
    record = {"schema": SCHEMA, "evaluation": name, "step": step, "values": values, "scores": []}
    write_atomically(file, json.dumps(record, indent=1))
