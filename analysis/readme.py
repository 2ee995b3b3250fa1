"""What an experiment's README says: its question and its verdict, as plain text."""

import re
from pathlib import Path


def story(readme: Path) -> dict[str, str]:
    """Return the paragraphs that begin with **Question.** and **Verdict.**, those that there are."""
    if not readme.exists():
        return {}
    found = re.findall(
        r"^\*\*(Question|Verdict)\.\*\*(.*?)(?=\n\n|\Z)",
        readme.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    return {
        name.lower(): re.sub(r"\[([^]]*)\]\([^)]*\)|`([^`]*)`", r"\1\2", " ".join(text.split()))
        for name, text in found
    }
