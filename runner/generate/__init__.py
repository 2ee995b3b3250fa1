"""Text from a trained model: the engine, sampling, beams, streams."""

__all__ = [
    "autoregressive",
    "beam",
    "choosing",
    "decoding_batch",
    "engine",
    "generate",
    "request",
    "sampling",
    "text_generator",
    "text_row",
    "text_stream",
]
