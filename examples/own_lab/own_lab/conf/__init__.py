"""Hydra groups of this package: hydra.searchpath=[pkg://own_lab.conf]."""
