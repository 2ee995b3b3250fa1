"""Export of trained models: Hugging Face folders, tokenizers, model cards."""

__all__ = [
    "huggingface",
    "model_card",
    "tokenizer",
]
