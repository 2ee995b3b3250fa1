"""Commands that run a module of ours in another process."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
# The folder is taken out again: where it is site-packages it would hide the standard library.
_CODE = (
    "import runpy, sys; sys.path.insert(0, {root!r}); import {package}; sys.path.pop(0); "
    "runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command `python -m module arguments`, for a module of ours.

    It runs this installation's whatever packages the working directory holds.
    """
    package = module.partition(".")[0]
    code = _CODE.format(root=str(_ROOT), package=package, module=module)
    return [sys.executable, "-c", code, *arguments]
