"""Models for others and from elsewhere: Hugging Face folders, model cards."""
