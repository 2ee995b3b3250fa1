"""How a command ends that a user's mistake, a disk or Ctrl-C ended: one message, no traceback."""

import difflib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from runner.machine.errors import EspalierError
from runner.machine.interrupt import INTERRUPTED
from runner.machine.system_errors import system_error
from runner.records.config import RunConfig

_NO_CHOICE = re.compile(
    r"In '[^']*': Could not find '(?P<group>[^']+)/(?P<name>[^'/]+)'\s+"
    r"Available options in '[^']*':\n(?P<valid>(?:\t\S+\n)+)"
)
_SEVERAL = re.compile(r"Ambiguous value for argument '(.+)'\n")
_MANDATORY = re.compile(r"Missing mandatory value: (\S+)")
_EXAMPLES = {"hydra.sweeper.space": "{optim.lr:{low:1e-4,high:1e-2,log:true}}"}
_UNKNOWN = re.compile(r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'")


@contextmanager
def refusals(*others: type[Exception]) -> Iterator[None]:
    """Exit with the message of a user's error, of `others` or of the system's, and after Ctrl-C."""
    refused: tuple[type[Exception], ...] = (EspalierError, *others)
    try:
        yield
    except refused as error:
        sys.exit(f"error: {explain(error)}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UnicodeError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {system_error(error)}")
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if not _raised_by_hydra(error):
            raise
        sys.exit(f"error: these overrides cannot be composed: {_first_line(error)}")


def explain(error: Exception) -> str:
    """Return the message of an error; what Hydra says of a wrong key in our own words."""
    cause = error.__cause__
    while cause is not None:  # Hydra tells which object it was making when ours was raised
        if isinstance(cause, EspalierError):
            return str(cause)
        cause = cause.__cause__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    several = _SEVERAL.match(text)
    if several:
        key, _, values = several[1].lstrip("+").partition("=")
        return (
            f"{key}={values}: several values are a grid, which is run by -m: python -m runner -m "
            f"{key}={values} ...; one value that is a list is given as {key}=[{values}]"
        )
    mandatory = _MANDATORY.match(text)
    if mandatory:
        key = mandatory[1]
        return f"{key} must be given; add {key}={_EXAMPLES.get(key, 'VALUE')}"
    unknown = _UNKNOWN.search(text)
    if unknown:
        return _unknown_key(unknown[1])
    choice = _NO_CHOICE.match(text)
    if choice:
        near = difflib.get_close_matches(choice["name"], choice["valid"].split(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        valid = ", ".join(choice["valid"].split())
        return f"{choice['group']}={choice['name']}: there is none{hint}; there are: {valid}"
    if "does not support sweep type" in text:
        return (
            f"{text}: a grid takes a,b or range(1,9); for an interval give hydra.sweeper.draw, or "
            "hydra/sweeper=optuna with hydra.sweeper.space"
        )
    cause = error.__cause__
    if text.startswith("Error merging override") and cause is not None:
        key = text.split()[3].lstrip("+").partition("=")[0]
        return f"{key}: {_first_line(cause)}; a list is given whole: key=[...,...]"
    return text.strip()


def _unknown_key(key: str) -> str:
    valid = [field.name for field in fields(RunConfig)]
    first = key.lstrip("+~").partition("@")[0].partition(".")[0]
    near = difflib.get_close_matches(first, valid, n=1)
    hint = f"; did you mean {near[0]}?" if near and near[0] != first else ""
    return f"{key} is not a key{hint}; valid: {', '.join(valid)} (`espalier keys` lists all below)"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _raised_by_hydra(error: BaseException) -> bool:
    """Return whether the innermost function is of Hydra, its parser or its container of values."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package = str(frames[-1].f_globals.get("__name__", "")).partition(".")[0]
    return package in ("hydra", "omegaconf", "antlr4")
