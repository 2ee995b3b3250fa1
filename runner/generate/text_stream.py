"""Streams text from tokens: complete characters only, and nothing that may become a stop string."""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_MAX_BYTES = 4  # of a UTF-8 character
_MAX_PENDING = 16  # tokens that are decoded together, where no character ends


class TextStream:
    """Decodes the tokens of one request as they arrive, each with the few before it.

    A token's text depends on what precedes it (the first word of a text has no space before it in
    SentencePiece), so the text is that by which all ids decode to more than `prompt` alone.

    Args:
        decode: returns the text of ids, incomplete UTF-8 as U+FFFD.
        stop: strings that end the text.
        prompt: ids that the text goes on from.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        self.text = ""  # emitted so far
        self.stopped = False
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        # Of the text of the ids in the window, the first `_taken` characters are held or emitted.
        self._window, self._taken = _whole_characters(decode, prompt)
        self._clean = len(self._window)  # so many ids of the window end with a character
        self._window += prompt[self._clean :]

    def push(self, token: int) -> str:
        """Add a token; return the text that can no longer change."""
        self.ids.append(token)
        self._window.append(token)
        return self._emit(self._settled(), final=False)

    def push_given(self, token: int) -> str:
        """Add a token that was not generated: no stop string counts in what it says."""
        self.ids.append(token)
        self._window.append(token)
        text, self._held = self._held + self._settled(), ""
        self.text += text
        return text

    def finish(self) -> str:
        """Return the text held back so far; a character left incomplete is U+FFFD."""
        return "" if self.stopped else self._emit(self.decode(self._window)[self._taken :], True)

    def _settled(self) -> str:
        """Return what the newest token settles of the text, and move the window on."""
        text = self.decode(self._window)
        broken, pending = len(text) - len(text.rstrip(_BROKEN)), len(self._window) - self._clean
        # More than three tokens that complete no character hold bytes that never will.
        open_ = broken if pending < _MAX_BYTES else min(broken, _MAX_BYTES - 1)
        settled = text[self._taken : len(text) - open_]
        self._taken = max(self._taken, len(text) - open_)
        if open_ == 0 and not settled and self._taken:
            self._window.pop()  # a special token: without text, and nothing depends on it
        elif open_ == 0:
            self._move_window(self._clean, 0)
            self._clean = len(self._window)
        elif pending > _MAX_PENDING:
            self._move_window(len(self._window) - _MAX_PENDING // 2, len(text) - self._taken)
            self._clean = 0
        return settled

    def _move_window(self, start: int, open_: int) -> None:
        """Drop the ids before `start`, unless the rest has no text to stand before what follows.

        The last `open_` characters are neither held nor emitted.
        """
        text = self.decode(self._window[start:])
        if text:
            self._window, self._taken = self._window[start:], len(text) - open_

    def _emit(self, settled: str, final: bool) -> str:
        text = self._held + settled
        stops = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        if stops:
            self.stopped = True
            end = min(stops)
        else:
            end = len(text) - (0 if final else _num_pending(text, self.stop))
        self._held = text[end:]
        self.text += text[:end]
        return text[:end]


def _whole_characters(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int]
) -> tuple[list[int], int]:
    """Return the ids of `prompt` up to its last whole character, and the length of their text."""
    for cut in range(min(_MAX_BYTES, len(prompt) + 1)):
        ids = list(prompt[: len(prompt) - cut])
        text = decode(ids) if ids else ""
        if not text.endswith(_BROKEN):
            return ids, len(text)
    return list(prompt), len(decode(prompt))


def _num_pending(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end may become part of a stop string."""
    held = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), held, -1):
            if text.endswith(string[:length]):
                held = length
                break
    return held
