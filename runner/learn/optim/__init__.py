"""Optimisers and learning-rate schedules; parameter groups are made in `groups`."""
