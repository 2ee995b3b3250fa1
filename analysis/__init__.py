"""Runs to knowledge: one tidy table, then curves, scaling plots, paired differences.

Reads run folders or an MLflow store, or any table with the same columns; never torch, never runner.
"""
