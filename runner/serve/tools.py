"""Calls of tools in a text, as Hermes and Qwen write them.

    <tool_call>{"name": "weather", "arguments": {"city": "Lund"}}</tool_call>

What is no call, or no JSON, stays text: nothing that the model says is lost.
"""

import json
import uuid
from typing import Any

_BEGIN, _END = "<tool_call>", "</tool_call>"


class ToolParser:
    """Takes a text piece by piece.

    Attributes:
        calls: those that are complete, as OpenAI writes them.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._held = ""

    def push(self, piece: str) -> str:
        """Return what is text for sure; calls that are complete are taken out."""
        self._held += piece
        shown = ""
        while _BEGIN in self._held:
            before, _, rest = self._held.partition(_BEGIN)
            shown, self._held = shown + before, _BEGIN + rest
            if _END not in rest:
                return shown
            body, _, after = rest.partition(_END)
            call = _call(body)
            if call is None:
                shown += f"{_BEGIN}{body}{_END}"
            else:
                self.calls.append(call)
                after = after.lstrip("\n")
            self._held = after
        keep = next(n for n in range(len(_BEGIN) - 1, -1, -1) if self._held.endswith(_BEGIN[:n]))
        cut = len(self._held) - keep
        shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return what is left: the beginning of a call that did not end."""
        rest, self._held = self._held, ""
        return rest


def _call(body: str) -> dict[str, Any] | None:
    try:
        given = json.loads(body)
    except ValueError:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    arguments = json.dumps(given.get("arguments", {}), ensure_ascii=False)
    function = {"name": given["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
