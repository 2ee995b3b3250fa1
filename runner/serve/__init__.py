"""Trained models in use: generation."""
