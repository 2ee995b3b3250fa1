"""The machine beneath: errors, storage, processes, hardware, environment."""

__all__ = [
    "code",
    "environment",
    "errors",
    "hardware",
    "interrupt",
    "memo",
    "memory_kill",
    "own_modules",
    "ranks",
    "storage",
    "system_errors",
    "text_files",
    "typed_json",
]
