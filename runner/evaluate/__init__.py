"""Measures of a trained model: validation, benchmarks, a look inside."""
