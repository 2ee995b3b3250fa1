"""An Optuna study whose trials are cells: the base cell with some keys set to drawn values.

The study is a journal file (sweeps/<name>/study.log, whose lock works on NFS): a local pool or any
number of SLURM jobs share it without a daemon. A slot continues an interrupted trial before it
draws a new one. Pruned trials are `interrupted` cells, which a grid may finish later.
"""

import copy
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from models.config import config
from runner.grid.language import Axis
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records import metrics
from runner.records.cells import Cell, freeze_cell, join_sweep, load_cell, make_cells
from runner.records.config import freeze, set_key, typed

_STARTABLE = ("new", "interrupted")
_TAKEN_S = 60.0


@config
class StudyConfig:
    """Keys of `hydra/sweeper=optuna`.

    Args:
        space: the axis of each key drawn, as in a grid's draw.
        metric: the metric optimised, by its last value in a run.
        direction: minimize or maximize.
        trials: the number of cells, including pruned and diverged ones.
        sampler: tpe (tree-structured Parzen estimator) or random.
        pruner: median stops a trial whose metric is worse than the median of the others at the
            same step.
        startup: the first trials, which are drawn at random and not pruned.
        seed: seeds the sampler.
    """

    space: dict[str, Axis]
    metric: str = "val_loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    trials: int = 20
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "median"] = "none"
    startup: int = 5
    seed: int = 0


class Study:
    """The study of one sweep in one process, a `CellSource` of pools.

    Args:
        folder: of the sweep.
        cfg: the keys of the sweeper.
        base: the config in which the drawn keys are set.
        slot: the number of this process among those that start together; each has its own seed.
    """

    def __init__(self, folder: Path, cfg: StudyConfig, base: dict[str, Any], slot: int = 0) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.cfg, self.base = folder, cfg, base
        self.root = folder.parent.parent
        self._readers: dict[str, metrics.MetricsReader] = {}
        folder.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
        name, num_trials = folder.name, 0
        if name in [existing.study_name for existing in storage.get_all_studies()]:
            num_trials = len(optuna.load_study(study_name=name, storage=storage).trials)
        # A later process must not draw the points of an earlier one again.
        seed = cfg.seed + num_trials + 10_000 * slot
        random = optuna.samplers.RandomSampler(seed=seed)
        tpe = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=cfg.startup, constant_liar=True
        )
        median = optuna.pruners.MedianPruner(n_startup_trials=cfg.startup)
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction=cfg.direction,
            load_if_exists=True,
            sampler=tpe if cfg.sampler == "tpe" else random,
            pruner=median if cfg.pruner == "median" else optuna.pruners.NopPruner(),
        )

    def next_cell(self) -> Cell | None:
        """Return the cell of an interrupted trial, or of a new one; None if all are taken."""
        with storage.locked(self.folder / "study.lock"):
            for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
                cell = self._cell_of(trial)
                if cell is not None and self._take(cell, trial.number):
                    return cell
            while len(self.study.get_trials(deepcopy=False)) < self.cfg.trials:
                cell = self._draw()
                if cell is not None:
                    return cell
        return None

    def _draw(self) -> Cell | None:
        """Draw a trial and return its cell, None if the cell needs no run: it has ended before."""
        trial = self.study.ask()
        node = copy.deepcopy(self.base)
        for key, axis in self.cfg.space.items():
            set_key(node, key, _suggest(trial, key, axis))
        drawn = " ".join(f"{key.rpartition('.')[2]}={_short(v)}" for key, v in trial.params.items())
        (cell,) = make_cells([(f"trial {trial.number}: {drawn}", node)])
        freeze_cell(cell)
        join_sweep(self.folder.name, [cell])
        trial.set_user_attr("fingerprint", cell.fingerprint)
        trial.set_user_attr("label", cell.label)
        if self.record_outcome(cell):
            return None
        return cell if self._take(cell, trial.number) else None

    def _take(self, cell: Cell, number: int) -> bool:
        """Take a trial for this slot; return False if its cell runs or was taken a minute ago.

        A minute is enough for a worker to lease the cell. Both times are the file server's.
        """
        if cell.state not in _STARTABLE:
            return False
        slots = self.folder / "slots"
        slots.mkdir(exist_ok=True)
        note, now = slots / str(number), slots / "now"
        now.touch()
        if note.exists() and now.stat().st_mtime - note.stat().st_mtime < _TAKEN_S:
            return False
        note.touch()
        return True

    def record_outcome(self, cell: Cell) -> bool:
        """Record the outcome of a cell's trials in the study; return False if it has not ended."""
        state = cell.state
        outcome = {
            "finished": TrialState.COMPLETE,
            "diverged": TrialState.PRUNED,  # bad, not unknown
            "failed": TrialState.FAIL,
        }.get(state)
        if outcome is None:
            return False
        for trial in self._running(cell):
            values = [self._last(cell)] if state == "finished" else None
            self.study.tell(trial.number, values, outcome, skip_if_finished=True)
        return True

    def should_stop(self, cell: Cell) -> bool:
        """Report the new values of a running cell; return whether the study prunes it."""
        reader = self._readers.setdefault(cell.fingerprint, metrics.MetricsReader(cell.folder))
        rows = metrics.valid_rows(reader.read())
        values = {r["step"]: float(r[self.cfg.metric]) for r in rows if self.cfg.metric in r}
        for frozen in self._running(cell):
            trial = Trial(self.study, frozen._trial_id)
            for step in sorted(values.keys() - frozen.intermediate_values.keys()):
                trial.report(values[step], step)
            if values and trial.should_prune():
                self.study.tell(frozen.number, None, TrialState.PRUNED)
                return True
        return False

    def is_over(self) -> bool:
        """Return whether all trials have been drawn and have an outcome."""
        trials = self.study.get_trials(deepcopy=False)
        return len(trials) >= self.cfg.trials and all(t.state.is_finished() for t in trials)

    def cells(self) -> list[Cell]:
        """Return the cells of all trials so far."""
        cells = (self._cell_of(trial) for trial in self.study.get_trials(deepcopy=False))
        return list({c.fingerprint: c for c in cells if c is not None}.values())

    def best(self) -> str:
        """Return a line with the number of trials by state and the best trial."""
        trials = self.study.get_trials(deepcopy=False)
        states = Counter(trial.state.name for trial in trials)
        counts = ", ".join(f"{count} {name.lower()}" for name, count in sorted(states.items()))
        try:
            best = self.study.best_trial
        except ValueError:
            return f"{len(trials)} trials ({counts}), none complete"
        value, label = best.value, best.user_attrs["label"]
        return f"{len(trials)} trials ({counts}); best {self.cfg.metric} {value:.4f}: {label}"

    def _running(self, cell: Cell) -> list[FrozenTrial]:
        running = self.study.get_trials(states=(TrialState.RUNNING,))
        return [t for t in running if t.user_attrs.get("fingerprint") == cell.fingerprint]

    def _cell_of(self, trial: FrozenTrial) -> Cell | None:
        fingerprint = trial.user_attrs.get("fingerprint")
        if fingerprint is None:
            return None
        cell = load_cell(self.root / "runs" / fingerprint)
        return Cell(cell.config, cell.science, cell.fingerprint, trial.user_attrs["label"])

    def _last(self, cell: Cell) -> float:
        last = metrics.latest(cell.folder, self.cfg.metric)
        if self.cfg.metric not in last:
            known = sorted(
                metrics.last_values(metrics.read(cell.folder)).keys() - metrics.NOT_METRICS
            )
            raise ConfigError(
                f"hydra.sweeper.metric={self.cfg.metric} was never logged; "
                f"there are: {', '.join(known)}"
            )
        return float(last[self.cfg.metric])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load_study(folder: Path, slot: int = 0) -> Study:
    """Return the study saved in a sweep's folder by `save_study`; see `Study`."""
    record = json.loads((folder / "study.json").read_text())
    return Study(folder, typed("study", StudyConfig, record["study"]), record["base"], slot)


def _suggest(trial: Trial, key: str, axis: Axis) -> Any:
    if axis.choices is not None:
        return trial.suggest_categorical(key, list(axis.choices))
    assert axis.low is not None
    assert axis.high is not None
    if axis.integer:
        return trial.suggest_int(key, int(axis.low), int(axis.high), log=axis.log)
    return trial.suggest_float(key, axis.low, axis.high, log=axis.log)


def save_study(folder: Path, cfg: StudyConfig, base: Cell) -> None:
    """Write study.json, from which jobs load the study."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"study": asdict(cfg), "base": freeze(base.config)}
    storage.write_atomically(folder / "study.json", json.dumps(record))
