"""Data: text and synthetic sources, tokenizers, token files, the order of samples."""

__all__ = [
    "benchmark_files",
    "chat_template",
    "conversation_rows",
    "conversations",
    "conversations_config",
    "corpus",
    "markov",
    "markov_config",
    "order",
    "pretrained",
    "recall",
    "recall_config",
    "sources",
    "synthetic",
    "synthetic_config",
    "tokenizer_folder",
    "tokenizers",
    "tokenizers_config",
    "tokens",
    "tokens_config",
]
