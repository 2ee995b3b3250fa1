"""Fields of benchmark rows that need code: their files come in more than one form."""

import re
from typing import Any

Row = dict[str, Any]


def winogrande_contexts(row: Row) -> list[str]:
    """Return the text up to the blank, once with each of the two names filled in."""
    if "context_options" in row:
        return list(row["context_options"])
    before = row["sentence"].partition("_")[0]
    return [before + row["option1"], before + row["option2"]]


def winogrande_continuation(row: Row) -> str:
    """Return the text after the blank, which is scored."""
    after = row["continuation"] if "continuation" in row else row["sentence"].partition("_")[2]
    return str(after).strip()


def winogrande_answer(row: Row) -> int:
    """Return the index, 0 or 1, of the right name."""
    return int(row["gold"]) if "gold" in row else int(row["answer"]) - 1


def hellaswag_query(row: Row) -> str:
    """Return the beginning of the story."""
    if "query" in row:
        return str(row["query"])
    return _plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def hellaswag_endings(row: Row) -> list[str]:
    """Return the four endings."""
    return list(row["choices"]) if "choices" in row else [_plain(text) for text in row["endings"]]


def _plain(text: str) -> str:
    """Remove the markup of WikiHow's headings."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def mbpp_splits(rows: Any) -> dict[str, Any]:
    """Return `test`, tasks 11 to 510, and `examples`, the paper's few-shot tasks 2 to 4."""
    return {
        "test": rows.filter(lambda row: 11 <= row["task_id"] <= 510),
        "examples": rows.filter(lambda row: 2 <= row["task_id"] <= 4),
    }
