"""What a run does: sweep (points, cells, plan, launch), data, training, checkpoints, tracking."""

import importlib.util
import sys
from pathlib import Path

__all__ = [
    "commands",
    "data",
    "evaluate",
    "exchange",
    "generate",
    "grid",
    "launch",
    "learn",
    "machine",
    "records",
    "serve",
    "views",
    "work",
]

# `python -m runner` looks for packages in the working directory first, and a folder models/ of the
# user's must not take the place of ours. A snapshot for jobs has no analysis.
_HERE = Path(__file__).parent.parent
for _name in ("analysis", "conf", "kernels", "models"):
    _file = _HERE / _name / "__init__.py"
    if _name not in sys.modules and _file.exists():
        _spec = importlib.util.spec_from_file_location(_name, _file)
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])
