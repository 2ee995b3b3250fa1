"""The commands of `python -m analysis`, a file for each group."""
