"""A run behind OpenAI's interface: one thread owns the model, one event loop the clients."""

__all__ = [
    "access",
    "answers",
    "app",
    "engine_thread",
    "errors",
    "fields",
    "gate",
    "metrics",
    "pace",
    "requests",
    "served_model",
    "server",
    "tools",
    "vocabulary",
]
