"""Measures of a trained model: validation, benchmarks, a look inside."""

__all__ = [
    "answer_scorer",
    "benchmark_rows",
    "capacity",
    "code_execution",
    "config",
    "details",
    "evaluations",
    "forgetting",
    "generation_settings",
    "harness",
    "internals",
    "ngram_baseline",
    "people_config",
    "people_recall",
    "rewards",
    "samples",
    "sandbox",
    "scores",
    "validation",
]
