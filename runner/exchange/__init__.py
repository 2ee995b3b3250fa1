"""Export of trained models: Hugging Face folders, tokenizers, model cards."""
