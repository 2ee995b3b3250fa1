"""Text from tokens, piece by piece: only whole characters, and nothing that may turn out to be a stop string."""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_LONGEST = 4  # bytes of a character


class TextStream:
    """The text of one request as its tokens come.

    Args:
        decode: of all new ids, their text; broken UTF-8 as U+FFFD.
        stop: strings that end the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        self.text = ""  # what was handed out
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self.ids.append(token)
        return self._hand_out(self.decode(self.ids), final=False)

    def finish(self) -> str:
        """Return what was held back; a character that never became whole is U+FFFD."""
        return "" if self.stopped else self._hand_out(self.decode(self.ids), final=True)

    def _hand_out(self, whole: str, final: bool) -> str:
        found = [place for place in (whole.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped = True
            end = min(found)
        elif final:
            end = len(whole)
        else:
            end = len(whole) - _unsure(whole, self.stop)
        piece = whole[len(self.text) : max(end, len(self.text))]
        self.text += piece
        return piece


def _unsure(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end may still change, or become part of a stop string."""
    broken = len(text) - len(text.rstrip(_BROKEN))
    held = min(broken, _LONGEST - 1)
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), held, -1):
            if text.endswith(string[:length]):
                held = length
                break
    return held
