"""Text to batches: sources -> tokenizer -> token files on disk -> packed, ordered samples."""
