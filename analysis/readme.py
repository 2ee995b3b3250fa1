"""The question and the verdict of an experiment's README, as plain text."""

import re
from pathlib import Path


def story(readme: Path) -> dict[str, str]:
    """Return the paragraphs after **Question.** and **Verdict.** that the README has.

    Keys: question, verdict.
    """
    if not readme.exists():
        return {}
    paragraphs = re.findall(
        r"^\*\*(Question|Verdict)\.\*\*(.*?)(?=\n\n|\Z)",
        readme.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    return {
        name.lower(): re.sub(r"\[([^]]*)\]\([^)]*\)|`([^`]*)`", r"\1\2", " ".join(text.split()))
        for name, text in paragraphs
    }
