"""The grid language: points, expressions, stages, resources."""

__all__ = [
    "evaluation_cells",
    "expression",
    "language",
    "quantised_cells",
    "resources",
    "stages",
]
