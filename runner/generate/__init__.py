"""Text from a trained model: sampling, beams, streams."""

__all__ = [
    "beam",
    "generate",
    "sampling",
    "text_generator",
    "text_stream",
]
