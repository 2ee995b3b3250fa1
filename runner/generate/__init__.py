"""Text from a trained model: the engine, sampling, beams, streams."""

__all__ = [
    "as_trained",
    "autoregressive",
    "beam",
    "choosing",
    "decoding_batch",
    "denoise",
    "denoising",
    "engine",
    "generate",
    "request",
    "reveal",
    "sampling",
    "scoring",
    "text_generator",
    "text_row",
    "text_stream",
]
