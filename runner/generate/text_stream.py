"""Streams text from tokens: complete characters only, and nothing that may become a stop string."""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_MAX_BYTES = 4  # of a UTF-8 character


class TextStream:
    """Decodes the tokens of one request as they arrive.

    Args:
        decode: returns the text of all new ids, incomplete UTF-8 as U+FFFD.
        stop: strings that end the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        self.text = ""  # emitted so far
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that can no longer change."""
        self.ids.append(token)
        return self._emit(self.decode(self.ids), final=False)

    def finish(self) -> str:
        """Return the text held back so far; a character left incomplete is U+FFFD."""
        return "" if self.stopped else self._emit(self.decode(self.ids), final=True)

    def _emit(self, text: str, final: bool) -> str:
        stops = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        if stops:
            self.stopped = True
            end = min(stops)
        elif final:
            end = len(text)
        else:
            end = len(text) - _num_pending(text, self.stop)
        piece = text[len(self.text) : max(end, len(self.text))]
        self.text += piece
        return piece


def _num_pending(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end may change or become part of a stop string."""
    broken = len(text) - len(text.rstrip(_BROKEN))
    held = min(broken, _MAX_BYTES - 1)
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), held, -1):
            if text.endswith(string[:length]):
                held = length
                break
    return held
