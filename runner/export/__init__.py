"""Models from elsewhere and for others: Hugging Face folders."""
