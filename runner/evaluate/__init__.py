"""Measures of a trained model: validation, benchmarks, a look inside."""

__all__ = [
    "benchmark_rows",
    "code_execution",
    "config",
    "details",
    "evaluations",
    "generation_settings",
    "harness",
    "internals",
    "ngram_baseline",
    "samples",
    "sandbox",
    "scores",
    "validation",
]
