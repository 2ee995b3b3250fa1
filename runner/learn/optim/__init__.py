"""Optimisers, their parameter groups, learning-rate schedules and weight averages."""
