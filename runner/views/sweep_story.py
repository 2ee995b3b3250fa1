"""What a sweep's experiment says of it, as `espalier plots` and `report` note it for other views.

sweeps/<name>/story.json    {"question", "verdict"}, where the experiment's README has them
sweeps/<name>/figure.png    the figure that shows the result, small
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from runner.machine import storage
from runner.machine.typed_json import read_record


class _Story(TypedDict):
    question: NotRequired[str]
    verdict: NotRequired[str]


def note_story(root: Path, sweep: str, told: Mapping[str, str]) -> None:
    """Note what the experiment of a sweep says: question and verdict, if it has them."""
    storage.write_atomically(_file(root, sweep), json.dumps(dict(told)))


def read_story(root: Path, sweep: str) -> dict[str, str]:
    """Return what was noted of a sweep; {} before."""
    file = _file(root, sweep)
    return read_record(file, _Story) if file.exists() else {}


def figure_file(root: Path, sweep: str) -> Path:
    """Return where the small figure of a sweep lies, if there is one."""
    return root / "sweeps" / sweep / "figure.png"


def _file(root: Path, sweep: str) -> Path:
    return root / "sweeps" / sweep / "story.json"
