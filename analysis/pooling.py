"""What runs of one mean differ in besides the seed: said, so that no figure averages recipes.

A table read by `analysis.runs` or `analysis.stores` knows its settings (`attrs["settings"]`). In
any other table a column is a setting unless it is a seed, a name of the run, or by its name
measured.
"""

import json
import re
import warnings
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import pandas as pd

SETTINGS, POOLED = "settings", "pooled"  # keys of a table's attrs
_SEED = re.compile(r"(?i)(^|[^a-z])seeds?($|[^a-z])")
_NAMES = re.compile(r"(?i)(^|[^a-z])(name|id|uuid|run|date|time|host|path)$")
_OURS = ("fingerprint", "label", "state")  # of `analysis.runs`, in each of its tables
_MEASURED = re.compile(  # but not grad_acc, init_std, max_norm or loss_weight
    r"(?i)(loss|val_bound|(?<!grad_)acc|accuracy|score|ppl|perplexity|bpb|bits_per_byte|nats"
    r"|grad_norm|stderr|(^|_)time|seconds|hours|_per_s|wall_s|_ms|mfu|memory|_bytes|flops)$"
)
_SHOWN = 3  # groups and columns named in a sentence


class PooledWarning(UserWarning):
    """Runs that differ in more than the seed are averaged."""


def is_seed(column: object) -> bool:
    """Return whether a column holds seeds of runs, by its name: seed, random_seed, model.seed.

    `data.seed` is none: it makes other data.
    """
    return bool(_SEED.search(str(column))) and not str(column).startswith("data.")


def varied(table: pd.DataFrame) -> list[str]:
    """Return the settings in which runs of `table` differ, none that follows from those before it.

    The names chosen in groups come first, so that `precision` stands for all keys of its node.
    """
    columns = [c for c in _settings(table) if not is_seed(c)]
    return _independent(_hashable(table[columns]))


def pooled(table: pd.DataFrame, by: Sequence[str], metric: str) -> str:
    """Return a sentence about the groups of `by` whose runs differ in more than the seed, or "".

    In a foreign table one that has a seed twice says so too.

    Args:
        table: the runs that are averaged; metric: what is.
    """
    columns = [column for column in _settings(table) if column not in (*by, metric)]
    plain, keys = _hashable(table[columns]), _hashable(table[list(by)])
    seeds = [column for column in plain if is_seed(column)]
    settings = plain.drop(columns=seeds)
    settings = settings.loc[:, settings.nunique(dropna=False) > 1]
    group = keys.groupby(list(by), sort=False, dropna=False).ngroup()
    counts = settings.groupby(group, sort=False).nunique(dropna=False)
    reasons = {
        number: _listed(_independent(settings[group == number]))
        for number in counts.index[counts.gt(1).any(axis=1)]
    }
    if seeds and not reasons and SETTINGS not in table.attrs:
        same = f"what no column says ({', '.join(map(str, seeds))} is the same)"
        reasons = dict.fromkeys(group[plain.assign(_group=group).duplicated()].unique(), same)
    if not reasons:
        return ""
    found = [
        f"{' '.join(map(str, keys[group == number].iloc[0]))} in {reason}"
        for number, reason in list(reasons.items())[:_SHOWN]
    ]
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    said = "; ".join(found) + more
    return f"{metric} is averaged over runs that differ in more than the seed: {said}"


def say_pooled(result: pd.DataFrame, table: pd.DataFrame, by: Sequence[str], metric: str) -> None:
    """Note in `result`, and warn, what the groups of `by` in `table` pool; see `pooled`.

    `analysis.plots.save` prints the note under the figure.
    """
    note = pooled(table, by, metric)
    if note:
        result.attrs[POOLED] = note
        warnings.warn(note, PooledWarning, stacklevel=3)


def warn_in_one_line() -> None:
    """Make Python show a PooledWarning as a line of its own, without file and code."""
    usual = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], *more: Any, **named: Any) -> str:
        own = issubclass(category, PooledWarning)
        return f"note: {message}\n" if own else usual(message, category, *more, **named)

    warnings.formatwarning = formatted


def _settings(table: pd.DataFrame) -> list[Any]:
    """Return the columns that describe a run, seeds included, and do not measure or name it."""
    known: Collection[Any] | None = table.attrs.get(SETTINGS)
    if known is not None:
        return [column for column in table if column in known]
    others = [column for column in table if column not in _OURS]
    return [column for column in others if not _names_or_measures(column, table[column])]


def _names_or_measures(column: Hashable, values: "pd.Series[Any]") -> bool:
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return bool(_MEASURED.search(str(column)) or _NAMES.search(str(column)))
    return bool(_NAMES.search(str(column))) and values.map(str).is_unique


def _independent(table: pd.DataFrame) -> list[Any]:
    """Return the columns in which rows differ, none that follows from those before it.

    Names without a dot come first: `precision` before the keys of its node.
    """
    chosen: list[Any] = []
    for column in sorted(table, key=lambda c: "." in str(c)):
        groups = [table[c] for c in chosen] or [pd.Series(0, index=table.index)]
        if table[column].groupby(groups, dropna=False).nunique(dropna=False).gt(1).any():
            chosen.append(column)
    return chosen


def _hashable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with lists and mappings as JSON."""
    plain = table.copy()
    for column in filter(lambda c: pd.api.types.is_object_dtype(table[c]), table):
        plain[column] = table[column].map(
            lambda value: json.dumps(value) if isinstance(value, (list, dict)) else value
        )
    return plain


def _listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return ", ".join(map(str, columns[:_SHOWN])) + more
