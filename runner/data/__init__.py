"""Text and synthetic data, tokenizers, token files, the order of samples."""
