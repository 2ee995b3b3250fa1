"""The machine beneath: errors, storage, processes, hardware, environment."""
