"""Data: text and synthetic sources, tokenizers, token files, the order of samples."""
