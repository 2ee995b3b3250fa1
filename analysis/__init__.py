"""Runs to knowledge: one tidy table, then curves, scaling plots, paired differences.

Reads run folders or an MLflow store, or any table with the same columns; never torch, never runner.
"""

__all__ = [
    "ablation",
    "commands",
    "defaults",
    "design",
    "envelope",
    "errors",
    "evaluation",
    "expressions",
    "fit",
    "fit_console",
    "forecast",
    "history",
    "holder",
    "internals",
    "isoflop",
    "law",
    "law_plots",
    "laws",
    "minimise",
    "outputs",
    "paired",
    "paper",
    "plots",
    "projection",
    "readme",
    "report",
    "robustness",
    "run_plots",
    "runs",
    "source",
    "stores",
    "tables",
]
