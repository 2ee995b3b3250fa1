"""The grid language: points, expressions, stages, resources."""

__all__ = [
    "evaluation_cells",
    "expression",
    "language",
    "resources",
    "stages",
]
