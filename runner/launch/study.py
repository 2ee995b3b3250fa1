"""An Optuna study whose trials are cells: the base cell with some keys set to drawn values.

The studies of a sweep are kept in a journal file (sweeps/<name>/study.log, whose lock works on
NFS): a local pool or any number of SLURM jobs share them without a daemon. A slot continues an
interrupted trial before it draws a new one. Whoever looks at a study tells it the outcome of the
cells that have ended, whoever ran them. Pruned trials are `interrupted` cells, which a grid may
finish later.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from runner.grid.language import Axis
from runner.launch.study_config import StudyConfig, read_study
from runner.launch.trials import outcome, replace_trial, standing, tell
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records import journal, metrics
from runner.records.cells import (
    Cell,
    freeze_cell,
    join_sweep,
    load_cell,
    make_cells,
    with_execution,
)
from runner.records.config import execution_half, flatten, is_among, set_key, typed

_STARTABLE = ("new", "interrupted")
_TAKEN_S = 60.0


class Study:
    """A study of one sweep in one process, a `CellSource` of pools.

    Args:
        folder: of the sweep.
        cfg: the keys of the sweeper.
        base: the config in which the drawn keys are set.
        slot: the number of this process among those that start together; each has its own seed.
        fingerprint: of the study, see `study_config.identity`.
        log_name: its name in the journal file, by default the sweep's.
        choices: those of the base, see `Cell`.
    """

    def __init__(
        self,
        folder: Path,
        cfg: StudyConfig,
        base: dict[str, Any],
        slot: int = 0,
        fingerprint: str = "",
        log_name: str | None = None,
        choices: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.cfg, self.base, self.fingerprint = folder, cfg, base, fingerprint
        self.choices = {
            path: f"{name.removesuffix('*')}*" if _is_drawn(path, cfg.space) else name
            for path, name in choices.items()
        }
        self.root = folder.parent.parent
        self._readers: dict[str, metrics.MetricsReader] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.study = _open(folder / "study.log", log_name or folder.name, cfg, slot)

    def next_cell(self) -> Cell | None:
        """Return the cell of an interrupted trial, or of a new one; None if there is none."""
        with self._locked():
            self._settle()
            if self.problem() is not None:
                return None
            for trial in standing(self.study, TrialState.RUNNING):
                cell = self._cell_of(trial)
                if cell is not None and self._take(cell):
                    return self._with_newest_execution(cell)
            while self.problem() is None and len(standing(self.study)) < self.cfg.trials:
                cell = self._draw()
                if cell is not None:
                    return cell
        return None

    def _draw(self) -> Cell | None:
        """Draw a trial and return its cell, None if nothing is to run.

        An invalid point is a pruned trial; the outcome of a cell that has ended before is recorded.
        """
        trial = self.study.ask()
        node = copy.deepcopy(self.base)
        for key, axis in self.cfg.space.items():
            set_key(node, key, _suggest(trial, key, axis))
        drawn = " ".join(f"{key.rpartition('.')[2]}={_short(v)}" for key, v in trial.params.items())
        label = f"trial {trial.number}: {drawn}"
        trial.set_user_attr("label", label)
        try:
            (cell,) = make_cells([(label, node)], [self.choices])
        except ConfigError as error:
            reason = str(error).removeprefix(f"{label}: ")
            drawn_trial = self.study.get_trials(deepcopy=False)[trial.number]
            tell(self.study, drawn_trial, TrialState.PRUNED, None, {"reason": reason})
            return None
        freeze_cell(cell)
        join_sweep(self.folder.name, [cell])
        trial.set_user_attr("fingerprint", cell.fingerprint)
        if self._record(cell):
            return None
        return cell if self._take(cell) else None

    def _take(self, cell: Cell) -> bool:
        """Take a cell for this slot; return False if it runs, is cancelled, or was just taken.

        Whoever took it has a minute to lease it; once its attempt has ended it is free again. Both
        times are the file server's.
        """
        if cell.state not in _STARTABLE or cell.cancelled.exists():
            return False
        slots = self.folder / "slots"
        slots.mkdir(exist_ok=True)
        note, now = slots / cell.fingerprint, slots / "now"
        now.touch()
        attempts = str(len(journal.attempts(cell.folder)))
        young = note.exists() and now.stat().st_mtime - note.stat().st_mtime < _TAKEN_S
        if young and note.read_text() == attempts:
            return False
        note.write_text(attempts)
        return True

    def _with_newest_execution(self, cell: Cell) -> Cell:
        """Freeze and return an interrupted cell with the execution keys of the latest launch.

        Where one of them counts under this model, the cell keeps its own.
        """
        half = execution_half(self.base).difference(self.cfg.space)
        keys = {key: value for key, value in flatten(self.base).items() if is_among(key, half)}
        with suppress(ConfigError):
            cell = with_execution(cell, keys)
            freeze_cell(cell, overwrite=True)
        return cell

    def record_outcome(self, cell: Cell) -> bool:
        """Record the outcome of a cell's trials in the study; return False if it has not ended."""
        with self._locked():
            return self._record(cell)

    def _record(self, cell: Cell) -> bool:
        if cell.state not in journal.ENDED:
            return False
        for trial in self._running(cell):
            tell(self.study, trial, *outcome(cell, self.cfg.metric))
        return True

    def _settle(self) -> None:
        """Record the outcome of trials whose cells have ended, whoever ran them."""
        for trial in standing(self.study):
            if trial.state == TrialState.COMPLETE:
                continue
            cell = self._cell_of(trial)
            if trial.state == TrialState.RUNNING:
                if cell is None:
                    tell(self.study, trial, TrialState.FAIL, None, {"void": True})
                else:
                    self._record(cell)
            elif cell is not None and cell.state == "finished":  # since then, by a retry or a grid
                state, value, _ = outcome(cell, self.cfg.metric)
                if state == TrialState.COMPLETE:
                    replace_trial(self.study, trial, value)

    def should_stop(self, cell: Cell) -> bool:
        """Report the new values of a running cell; return whether the study prunes it."""
        reader = self._readers.setdefault(cell.fingerprint, metrics.MetricsReader(cell.folder))
        rows = metrics.valid_rows(reader.read())
        values = {r["step"]: float(r[self.cfg.metric]) for r in rows if self.cfg.metric in r}
        with self._locked():
            for frozen in self._running(cell):
                trial = Trial(self.study, frozen._trial_id)
                for step in sorted(values.keys() - frozen.intermediate_values.keys()):
                    trial.report(values[step], step)
                if values and trial.should_prune():
                    tell(self.study, frozen, TrialState.PRUNED, None, {"reason": "pruned"})
                    return True
        return False

    def settle(self) -> None:
        """Record the outcome of every trial whose cell has ended, whoever ran it."""
        with self._locked():
            self._settle()

    def is_over(self) -> bool:
        """Return whether all trials have been drawn and have an outcome."""
        self.settle()
        return self.num_open() == 0

    def num_open(self) -> int:
        """Return the number of trials that are still to be drawn or have no outcome."""
        drawn, running = (len(standing(self.study, s)) for s in (None, TrialState.RUNNING))
        return running + max(0, self.cfg.trials - drawn)

    def problem(self) -> str | None:
        """Return why no further trial is drawn, None if they are: no run logs the metric."""
        trials = standing(self.study)
        unlogged = [t.user_attrs["reason"] for t in trials if "unlogged" in t.user_attrs]
        complete = any(trial.state == TrialState.COMPLETE for trial in trials)
        return unlogged[0] if unlogged and not complete else None

    def cells(self) -> list[Cell]:
        """Return the cells of all trials so far."""
        cells = (self._cell_of(trial) for trial in standing(self.study))
        return list({c.fingerprint: c for c in cells if c is not None}.values())

    def open_cells(self) -> list[Cell]:
        """Return the cells of trials that have no outcome."""
        cells = (self._cell_of(trial) for trial in standing(self.study, TrialState.RUNNING))
        return [cell for cell in cells if cell is not None]

    def best(self) -> str:
        """Return a line with the number of trials by state and the best trial."""
        trials = standing(self.study)
        if not trials:
            return "no trial yet"
        states = Counter(trial.state.name for trial in trials)
        counts = ", ".join(f"{count} {name.lower()}" for name, count in sorted(states.items()))
        try:
            best = self.study.best_trial
        except ValueError:
            return f"{len(trials)} trials ({counts}), none complete"
        value, label = best.value, best.user_attrs["label"]
        return f"{len(trials)} trials ({counts}); best {self.cfg.metric} {value:.4f}: {label}"

    def invalid_points(self) -> list[str]:
        """Return the reasons for which drawn points were no valid cells."""
        pruned = standing(self.study, TrialState.PRUNED)
        return [t.user_attrs["reason"] for t in pruned if "fingerprint" not in t.user_attrs]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with storage.locked(self.folder / "study.lock"):
            yield

    def _running(self, cell: Cell) -> list[FrozenTrial]:
        running = standing(self.study, TrialState.RUNNING)
        return [t for t in running if t.user_attrs.get("fingerprint") == cell.fingerprint]

    def _cell_of(self, trial: FrozenTrial) -> Cell | None:
        """Return the cell of a trial, None if it was never drawn or its run folder is gone."""
        folder = self.root / "runs" / trial.user_attrs.get("fingerprint", "")
        if "fingerprint" not in trial.user_attrs or not (folder / "cell.json").exists():
            return None
        return replace(load_cell(folder), label=trial.user_attrs["label"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _open(file: Path, name: str, cfg: StudyConfig, slot: int) -> optuna.Study:
    """Return the Optuna study `name` of a journal file, made if it is not there."""
    log = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    num_trials = 0
    if name in [existing.study_name for existing in log.get_all_studies()]:
        num_trials = len(optuna.load_study(study_name=name, storage=log).trials)
    # A later process must not draw the points of an earlier one again.
    seed = cfg.seed + num_trials + 10_000 * slot
    random = optuna.samplers.RandomSampler(seed=seed)
    tpe = optuna.samplers.TPESampler(seed=seed, n_startup_trials=cfg.startup, constant_liar=True)
    median = optuna.pruners.MedianPruner(n_startup_trials=cfg.startup)
    return optuna.create_study(
        storage=log,
        study_name=name,
        direction=cfg.direction,
        load_if_exists=True,
        sampler=tpe if cfg.sampler == "tpe" else random,
        pruner=median if cfg.pruner == "median" else optuna.pruners.NopPruner(),
    )


def load_study(folder: Path, slot: int = 0, fingerprint: str | None = None) -> Study:
    """Return a study that `save_study` has recorded in a sweep's folder, by default the latest."""
    name, record = read_study(folder, fingerprint)
    cfg = typed("study", StudyConfig, record["study"])
    choices = record.get("choices", {})
    return Study(folder, cfg, record["base"], slot, name, record["log_name"], choices)


def _is_drawn(path: str, space: Mapping[str, Axis]) -> bool:
    """Return whether a key of the node at `path` is drawn."""
    return any(key.startswith(f"{path}.") for key in space)


def _suggest(trial: Trial, key: str, axis: Axis) -> Any:
    if axis.choices is not None:
        return trial.suggest_categorical(key, list(axis.choices))
    assert axis.low is not None
    assert axis.high is not None
    if axis.integer:
        return trial.suggest_int(key, int(axis.low), int(axis.high), log=axis.log)
    return trial.suggest_float(key, axis.low, axis.high, log=axis.log)
