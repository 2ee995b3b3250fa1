"""The exception tree of the runner. Everything a user can cause is an EspalierError.

EspalierError
├── ConfigError       an override or a YAML node is wrong: refused before anything runs
├── DataError         a file is missing, empty or unreadable
├── CheckpointError   a checkpoint is damaged or belongs to another model
├── StorageError      a disk is full, a folder read-only, a store locked or too old
├── NetworkError      a server cannot be reached, or does not give what was asked of it
└── LeaseLost         another worker took the cell over: this one must stop writing
"""


class EspalierError(Exception):
    """Base class. The message says requirement, value and way out; no traceback is shown."""


class ConfigError(EspalierError, ValueError):
    """An override or a YAML node is wrong."""


class DataError(EspalierError, ValueError):
    """A data file is missing, empty or unreadable."""


class CheckpointError(EspalierError):
    """A checkpoint is damaged or belongs to another model."""


class StorageError(EspalierError, OSError):
    """A disk or a metrics store refused a read or a write."""


class NetworkError(EspalierError):
    """A server cannot be reached, or does not give what was asked of it."""


class LeaseLost(EspalierError):
    """Another worker took the cell over."""
