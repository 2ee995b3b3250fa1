"""Models of and for other programs: Hugging Face folders, GGUF files, tokenizers, model cards."""

__all__ = [
    "gguf_file",
    "gguf_model",
    "gguf_tokenizer",
    "huggingface",
    "model_card",
    "peft",
    "tokenizer",
]
