"""The grid language: points, expressions, stages, resources."""
