"""The strategy that adds one token to every row in each step."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.at_least_fp32 import at_least_fp32
from models.cache import State
from models.contract import read, reads_side_by_side, start
from models.prefix_cache import PrefixCache
from runner.generate.choosing import History, choose
from runner.generate.decoding_batch import DecodingBatch, prefill
from runner.generate.request import Event, Request
from runner.generate.sampling import Sampling
from runner.generate.scoring import MAX_LOGITS, padded, score_prompts
from runner.generate.text_row import Decode, TextRow


class Autoregressive:
    """See `runner.generate.engine.Strategy`.

    Args:
        context: the most tokens that the model reads. A text that outgrows it goes on from its last
            context / 2 tokens, which are read again.
        decode: returns the text of ids.
        ends: the ids that end a text whose sampling names no others.
        fixed_rows: compute with so many rows whatever runs, at least the `rows` of the engine, in a
            state of fixed shape; see `DecodingBatch`.
        invariant: read each prompt by itself, so that with `fixed_rows` no bit of a request depends
            on the others. Else prompts of one length are read together.
        compiled: decode by a compiled step; it needs `fixed_rows`.
        prefixes: what it has read of earlier texts of this model, so that texts with the same
            beginning go on from there (None: each is read whole, and so are scored prompts). It
            changes the pieces in which a text is read: last bits in fp32, nothing in fp64.
        bidirectional: tokens of a prompt see each other, and so do those of a tool's answer. They
            are read whole, and share nothing with other texts: `prefixes` and the engine's `chunk`
            are of no use then.

    Raises:
        ValueError: `compiled` without `fixed_rows`.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: int,
        decode: Decode,
        ends: Sequence[int] = (),
        fixed_rows: int | None = None,
        invariant: bool = True,
        compiled: bool = False,
        prefixes: PrefixCache | None = None,
        bidirectional: bool = False,
    ) -> None:
        if compiled and fixed_rows is None:
            raise ValueError("compiled=True needs a batch of one shape; give fixed_rows")
        self.model, self.context = model, context
        self.decode, self.ends, self.fixed_rows = decode, tuple(ends), fixed_rows
        self._reads_alone = invariant and fixed_rows is not None
        self.prefixes = None if bidirectional else prefixes
        self.bidirectional = bidirectional
        self._batch = DecodingBatch(
            model, context, fixed_rows, compiled=compiled, invariant=invariant
        )
        self._unread: dict[str, TextRow] = {}
        can = not (self._reads_alone or bidirectional)
        self._reads_beside = can and reads_side_by_side(model)

    def check(self, request: Request) -> None:
        """See `Strategy`."""
        if not isinstance(request.how, Sampling):
            raise ValueError(
                "an autoregressive model samples token after token and fills in no canvas; give "
                "Sampling settings (espalier generate: without --steps, --algorithm, --block)"
            )
        ids, vocab, first = request.prompt, self.model.vocab_size, request.score_from
        if len(ids) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        for index in (min(ids), max(ids)):
            if not 0 <= index < vocab:
                raise ValueError(
                    f"the prompt has the id {index}; those of this model are 0 to {vocab - 1}: "
                    "encode it with the model's own tokenizer"
                )
        if first is not None and not 1 <= first <= len(ids):
            raise ValueError(
                f"score_from={first} must be in 1 to {len(ids)}, the length of the prompt; its "
                "first token, number 0, has nothing before it"
            )
        if first is not None and self.bidirectional:
            raise ValueError(
                "the tokens of a prompt see each other in this model, which predicts none of them; "
                "leave score_from out"
            )
        request.how.check_vocabulary(vocab)

    def admit(self, request: Request) -> TextRow:
        """See `Strategy`."""
        how, prompt = request.how, request.prompt
        assert isinstance(how, Sampling)
        ends = self.ends if how.ends is None else how.ends
        size, device = self.model.vocab_size, self._batch.device
        history = History(how, ends, prompt, request.constraint, size, device)
        row = TextRow(request, history, self.decode)
        self._unread[request.id] = row
        self._recall(row)
        return row

    def _recall(self, row: TextRow) -> None:
        """Let a row whose prompt begins as an earlier text did go on from there."""
        if self.prefixes is None or row.is_idle or row.unscored is not None:
            return
        state = start(self.model, 1, self._room([row]))
        read = row.tokens[:-1]  # the last one's logits are needed
        known = self.prefixes.load(read, state, salt=row.request.salt)
        if known:
            row.state, row.unread, row.num_cached = state, row.unread - known, known

    @torch.no_grad()
    def read(self, rows: Sequence[TextRow], most: int | None) -> list[Event]:
        """See `Strategy`."""
        scored = [row for row in rows if row.is_only_scored]
        if most is not None or self.fixed_rows is not None:
            scored = []
        groups: dict[Hashable, list[TextRow]] = {}
        for row in rows:
            if row in scored:
                continue
            groups.setdefault(self._group(row, most), []).append(row)
        chosen = list(groups.values())[: None if most is None else 1]
        events = {event.id: event for group in chosen for event in self._read_together(group, most)}
        events |= {event.id: event for event in self._score_together(scored)}
        return [events[row.request.id] for row in rows if row.request.id in events]

    @torch.no_grad()
    def advance(self, rows: Sequence[TextRow]) -> list[Event]:
        """See `Strategy`."""
        newest = {row.request.id: row.tokens[-1] for row in rows}
        logits = self._batch.step(newest, keep=len(self._unread))
        events = self._take(rows, logits)
        self._slide(rows, events)
        return events

    @torch.no_grad()
    def advance_and_read(
        self, rows: Sequence[TextRow], unread: Sequence[TextRow], most: int
    ) -> list[Event] | None:
        """See `runner.generate.engine.ReadsBeside`: for prompts that nobody scores."""
        first = unread[0]
        plain = not (first.is_idle or first.answered or first.unscored is not None)
        if not (plain and self._reads_beside):
            return None
        key = self._group(first, most)
        group = [row for row in unread if self._group(row, most) == key]
        piece = self._piece(first, most)
        first.state = self._batch.state_beside(len(first.tokens), first.state)
        newest = {row.request.id: row.tokens[-1] for row in rows}
        ids = first.unread_ids[:piece]
        logits, others = self._batch.step_beside(newest, len(self._unread), ids, first.state)
        events = self._take(rows, logits)
        self._slide(rows, events)
        return events + self._after(group, piece, others, first.state)

    def read_ahead(self, texts: Mapping[str, Sequence[int]], width: int) -> Tensor:
        """Read tokens that a draft proposes, in pieces of one `width` where the step is compiled.

        Return the logits after each, [rows, seq, vocab]. `go_back` must follow.
        """
        fixed = width if self.fixed_rows is not None else None
        return self._batch.read_ahead(texts, keep=len(self._unread), width=fixed)

    def place(self, row: TextRow) -> int:
        """Return the row of the batch that a text which is written has."""
        found = self._batch.place(row.request.id)
        assert found is not None
        return found[1]

    def go_back(self, rows: Sequence[TextRow], read: Sequence[int], events: list[Event]) -> None:
        """Forget of what `read_ahead` has read all but so many tokens of each row."""
        pairs = zip(rows, read, strict=True)
        self._batch.go_back({row.request.id: number for row, number in pairs})
        self._slide(rows, events)

    def _slide(self, rows: Sequence[TextRow], events: Sequence[Event]) -> None:
        """Let go on from the last half of its text who has outgrown the context."""
        ended = {event.id for event in events if event.finish}
        for row in rows:
            if row.request.id not in ended and len(row.tokens) > self.context:
                self._batch.leave(row.request.id)
                self._reread(row)

    def leave(self, row: TextRow) -> None:
        """See `Strategy`: the state of a row that waits lies in the memory of the host."""
        if self._unread.pop(row.request.id, None) is None:
            self._remember(row)
            row.state = self._batch.take(row.request.id)
            row.unread, row.answered = 1, True  # its newest token
            if self._batch.device.type != "cpu":
                row.state = row.state.to(torch.device("cpu"))

    def resume(self, row: TextRow, ids: Sequence[int]) -> Event:
        """See `Strategy`."""
        event = row.give(ids)
        if event.finish:
            return event
        if row.state is not None and self._batch.device.type != "cpu":
            row.state = row.state.to(self._batch.device)
        self._unread[row.request.id] = row
        if len(row.tokens) > self.context:
            self._reread(row)
        return event

    def release(self, row: TextRow) -> None:
        """See `Strategy`."""
        self._unread.pop(row.request.id, None)
        self._remember(row)
        self._batch.leave(row.request.id)
        row.state = None

    def _remember(self, row: TextRow) -> None:
        """Keep what a row has read, for texts that branch from it."""
        place = self._batch.place(row.request.id)
        if place is None and row.answered and row.state is not None:
            place = row.state, 0
        if self.prefixes is None or place is None or not place[0].can_truncate:
            return
        state, index = place
        if state.lengths.device == self._batch.device:  # not in the memory of the host
            read = row.tokens[: int(state.lengths[index])]
            self.prefixes.save(read, state, index, salt=row.request.salt)

    def num_bytes(self) -> int:
        """See `Strategy`."""
        begun = {id(row.state): row.state for row in self._unread.values()}
        own = sum(state.num_bytes() for state in begun.values() if state is not None)
        return own + self._batch.num_bytes()

    def _group(self, row: TextRow, most: int | None) -> Hashable:
        """Return a key that rows have in common if they are read together, without padding."""
        if row.is_idle:
            return "idle"
        if row.unscored is not None:
            return row.request.id
        if row.answered and most is None and self.fixed_rows is None:
            return "answered"
        spans = row.unread_spans if self.bidirectional else ()
        if most is None and not self._reads_alone and row.state is None:
            return row.unread, spans  # texts of one length
        return tuple(row.tokens), row.unread, spans, row.request.salt  # one text

    def _read_together(self, group: Sequence[TextRow], most: int | None) -> list[Event]:
        """Read a piece of each row of a group; a text that several of them have is read once."""
        first = group[0]
        if first.is_idle:
            return [row.end_unread() for row in group]
        if first.answered and most is None and self.fixed_rows is None:
            return self._read_answers(group)
        texts = list(dict.fromkeys(row.unread_ids for row in group))
        piece, room = self._piece(first, most, texts=len(texts)), self._room(group)
        if first.unscored is None:
            spans = first.unread_spans if self.bidirectional else None
            pieces = [ids[:piece] for ids in texts]
            logits, state = prefill(self.model, pieces, first.state, capacity=room, spans=spans)
        else:
            logits, state = self._score(first, piece, room)
        return self._after(group, piece, logits, state)

    def _piece(self, row: TextRow, most: int | None, *, texts: int = 1) -> int:
        """Return how many tokens to read of a row, whose group has so many different texts."""
        piece = row.unread if most is None or self.bidirectional else min(most, row.unread)
        if self.prefixes is None or row.unscored is not None or texts > 1:
            return piece
        if self._batch.keeps_every_length:
            return piece
        return self.prefixes.until_block_end(row.num_read, piece)

    def _room(self, group: Sequence[TextRow]) -> int:
        return max(min(self.context, len(row.tokens) + row.num_left) for row in group)

    def _after(
        self, group: Sequence[TextRow], piece: int, logits: Tensor, state: State
    ) -> list[Event]:
        """Note that a piece of each row of a group was read; those that are read whole go on."""
        first, all_ids = group[0], [row.unread_ids for row in group]
        texts = list(dict.fromkeys(all_ids))
        for row in group:
            row.unread -= piece
            row.state = state
        prefixes = self.prefixes if first.unscored is None else None
        if prefixes is not None:
            for index, row in {
                texts.index(ids): row for ids, row in zip(all_ids, group, strict=True)
            }.items():
                prefixes.save(row.tokens[: row.num_read], state, index, salt=row.request.salt)
        if first.unread:
            return []
        return self._enter(group, logits, state, [texts.index(ids) for ids in all_ids])

    def _read_answers(self, group: Sequence[TextRow]) -> list[Event]:
        """Read the answers of tools, each after its own text, in one pass."""
        state = start(self.model, len(group), self._room(group))
        for place, row in enumerate(group):
            state.put(torch.tensor([place], device=self._batch.device), row.state)
        tokens, counts = padded([row.unread_ids for row in group], self._batch.device)
        spans = None
        if self.bidirectional:
            spans, _ = padded([row.unread_spans for row in group], self._batch.device)
        logits = at_least_fp32(read(self.model, tokens, state, counts=counts, spans=spans))
        for row in group:
            row.unread, row.answered = 0, False
        return self._enter(group, logits, state, list(range(len(group))))

    def _score(self, row: TextRow, piece: int, room: int) -> tuple[Tensor, State]:
        """Read a piece of a prompt whose tokens are scored from `row.unscored` on."""
        assert row.unscored is not None
        ids, state, begun = row.unread_ids[:piece], row.state, 0
        most = max(1, MAX_LOGITS // self.model.vocab_size)
        while begun < piece:
            unneeded = row.unscored - 1 - (row.num_read + begun)  # their logits predict no score
            every = unneeded <= 0
            size = min(piece - begun, most if every else unneeded)
            text = ids[begun : begun + size]
            logits, state = prefill(self.model, [text], state, capacity=room, every=every)
            if every:
                row.score(logits[0])
                logits = logits[:, -1]
            begun += size
        assert state is not None
        return logits, state

    def _score_together(self, rows: Sequence[TextRow]) -> list[Event]:
        """Score prompts that nothing is read of, as many at once as there are."""
        salts = dict.fromkeys(row.request.salt for row in rows)
        for salt in salts:
            own = [row for row in rows if row.request.salt == salt]
            score_prompts(self.model, own, self.prefixes)
        for row in rows:
            del self._unread[row.request.id]
            row.unread, row.unscored = 0, None
        return [row.end_unread() for row in rows]

    def _enter(
        self, group: Sequence[TextRow], logits: Tensor, state: State, places: list[int]
    ) -> list[Event]:
        """Choose the first token of rows that are read; those that go on join the batch.

        Args:
            places: the row of `logits` and `state` that each row of the group has.
        """
        for row in group:
            del self._unread[row.request.id]
            row.state = row.unscored = None
        if not group[0].num_left:  # a prompt that was scored is alone in its group
            return [group[0].end_unread()]
        if places != list(range(len(logits))):
            logits = logits[torch.tensor(places, device=logits.device)]
        events = self._take(group, logits)
        going = [index for index, event in enumerate(events) if not event.finish]
        fitting = [index for index in going if len(group[index].tokens) <= self.context]
        for index in set(going) - set(fitting):
            self._reread(group[index])
        if fitting:
            own = [places[index] for index in fitting]
            if own != list(range(len(state.lengths))):
                state = state.select(torch.tensor(own, device=self._batch.device))
            self._batch.join([group[index].request.id for index in fitting], state)
        return events

    def _take(self, rows: Sequence[TextRow], logits: Tensor) -> list[Event]:
        choices = choose(logits, [row.history for row in rows])
        return [row.take(choices, index) for index, row in enumerate(rows)]

    def _reread(self, row: TextRow) -> None:
        """Let a row that has outgrown the context go on from the last half of it."""
        kept = max(1, self.context // 2)
        row.tokens, row.spans = row.tokens[-kept:], row.spans[-kept:]
        row.unread, row.state, row.answered = len(row.tokens), None, False
        self._unread[row.request.id] = row
