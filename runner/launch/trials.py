"""The trials of a study: which of them count, and what a cell that has ended means for them.

Attributes of a trial: `label`, `fingerprint` of its cell, `reason` of its failure or pruning,
`unlogged` if that is a missing metric, `replaces` (the number of an earlier trial whose cell has
finished since), `void` if it was never drawn or its run is gone: it does not count.
"""

import math
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from runner.records import metrics
from runner.records.cells import Cell


def standing(study: optuna.Study, state: TrialState | None = None) -> list[FrozenTrial]:
    """Return the trials that count, those in `state` if one is given."""
    trials = study.get_trials(deepcopy=False)
    replaced = {trial.user_attrs.get("replaces") for trial in trials}
    return [
        trial
        for trial in trials
        if trial.number not in replaced
        and "void" not in trial.user_attrs
        and state in (None, trial.state)
    ]


def outcome(cell: Cell, metric: str) -> tuple[TrialState, float | None, dict[str, Any]]:
    """Return (state, value, attributes) of the trials of a cell that has ended."""
    if cell.state == "failed":
        return TrialState.FAIL, None, {"reason": "failed"}
    if cell.state == "diverged":  # bad, not unknown
        return TrialState.PRUNED, None, {"reason": "diverged"}
    last = metrics.latest(cell.folder, metric)
    if metric not in last:
        rows = metrics.last_values(metrics.read(cell.folder))
        known = ", ".join(sorted(rows.keys() - metrics.NOT_METRICS))
        why = f"hydra.sweeper.metric={metric} was never logged; there are: {known}"
        return TrialState.FAIL, None, {"reason": why, "unlogged": True}
    value = float(last[metric])
    if math.isnan(value):
        return TrialState.PRUNED, None, {"reason": f"{metric} is NaN"}
    return TrialState.COMPLETE, value, {}


def tell(
    study: optuna.Study,
    trial: FrozenTrial,
    state: TrialState,
    value: float | None,
    attributes: dict[str, Any],
) -> None:
    """End a running trial; the caller holds the study's lock."""
    running = Trial(study, trial._trial_id)
    for key, attribute in attributes.items():
        running.set_user_attr(key, attribute)
    study.tell(trial.number, value, state, skip_if_finished=True)


def replace_trial(study: optuna.Study, trial: FrozenTrial, value: float | None) -> None:
    """Add a complete trial in the place of one that ended otherwise, which Optuna cannot change."""
    kept = {key: trial.user_attrs[key] for key in ("label", "fingerprint")}
    study.add_trial(
        optuna.trial.create_trial(
            value=value,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=kept | {"replaces": trial.number},
        )
    )
