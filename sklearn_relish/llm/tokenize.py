"""Texts to token ids: cut to the length that is read, or split into overlapping windows.

`TextTokenizer` wraps a Transformers tokenizer. It also says which piece of the text each token is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sklearn_relish.utils.locks import FairLock, renew_in_forked_child

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZE_TEXTS = 256  # texts in one call of the tokenizer, which takes 100 bytes for each token
# Of a long text that is cut, only a part is tokenized: so many characters for each token wanted,
TOKEN_CHARACTERS = 16
# and some more, because the tokens next to the cut may differ from those of the complete text.
CUT_CHARACTERS = 512
OVERLAP = 4  # a window shares one in OVERLAP of its tokens with the window before


class Piece(NamedTuple):
    """Tokens that the model reads together: a text, or one window of a long text.

    Attributes
    ----------
    row : int
        Which text it is.
    ids : int64 array
        Token ids, special tokens included.
    begin, end : int
        The tokens whose states are kept for the text; the others are context.
    n_pieces : int
        How many pieces the text has.
    """

    row: int
    ids: np.ndarray
    begin: int
    end: int
    n_pieces: int


class Encoding(NamedTuple):
    """Tokens of a text, or of the part of it that begins at character `shift`."""

    ids: list[int]
    special: list[int]  # 1 for special tokens
    spans: list[tuple[int, int]]  # characters of the part; empty for a slow tokenizer
    shift: int


class TextTokenizer:
    """Token ids of texts, for one language model.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    context_length : int or None
        Tokens that the model has positions for; None or -1 for a model without such a limit.
    model : str
        The model's name, for errors.
    n_before : int, default=0
        Tokens of the context that a prefix needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int | None,
        model: str,
        n_before: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.model = model
        self.n_before = n_before
        self._renew_lock()
        renew_in_forked_child(self, TextTokenizer._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = FairLock()

    def token_limit(self, max_length: int) -> int:
        """Tokens that the model reads at once: `max_length`, or less if its context is shorter."""
        if max_length < 1:
            raise ValueError(f"max_length must be 1 or more, got {max_length}.")
        known = (self.tokenizer.model_max_length, self.context_length)
        limits = [limit for limit in known if limit and limit > 0]
        longest = min(limits, default=max_length + self.n_before)
        limit = min(max_length, longest - self.n_before)
        needed = 1 + sum(self._short_text[1]) if self.n_before else 1  # a token of the text
        if limit < min(max_length, needed):
            raise ValueError(
                f"The prefix has {self.n_before} tokens, and {self.model!r} reads {longest} tokens"
                " at once: shorten the prefix."
            )
        return limit

    @cached_property
    def special_ids(self) -> list[int]:
        """The special tokens that begin each text."""
        ids, special = self._short_text
        return ids[: _count_special_ends(special)[0]]

    @cached_property
    def _short_text(self) -> tuple[list[int], list[int]]:
        """Tokens of a short text, and 1 for the special ones."""
        with self._locked():
            encoded = self.tokenizer("a", return_special_tokens_mask=True)
        return encoded["input_ids"], encoded["special_tokens_mask"]

    def content_ids(self, text: str) -> list[int]:
        """Tokens of a text without special tokens."""
        with self._locked():
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def filler_id(self) -> int:
        """A token for texts that have none."""
        tokenizer = self.tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return token
        return 0

    @property
    def padding_id(self) -> int:
        """The token that batches are padded with."""
        padding = self.tokenizer.pad_token_id
        return self.filler_id if padding is None else padding

    def tokenize(
        self, texts: list[str], *, max_length: int, windows: bool
    ) -> tuple[list[Piece], np.ndarray]:
        """Pieces of each text, cut or in windows, and the number of tokens before the cut.

        The number of a very long text that is cut is a lower bound.
        """
        limit = self.token_limit(max_length)
        pieces: list[Piece] = []
        full_lengths = np.empty(len(texts), dtype=np.int64)
        for start in range(0, len(texts), TOKENIZE_TEXTS):
            encodings = self._encode(
                texts[start : start + TOKENIZE_TEXTS], None if windows else limit
            )
            for row, (ids, special, _, _) in enumerate(encodings, start):
                full_lengths[row] = len(ids)
                if len(ids) > limit and windows:
                    pieces += self._windows(row, ids, special, limit)
                    continue
                if len(ids) > limit:
                    ids = [ids[i] for i in self._kept_tokens(special, limit)]
                kept = np.asarray(ids or [self.filler_id], dtype=np.int64)
                pieces.append(Piece(row, kept, 0, len(kept), 1))
        return pieces, full_lengths

    def tokenize_in_chunks(
        self, texts: list[str], *, chunk_size: int, max_length: int, windows: bool
    ) -> Iterator[tuple[int, list[Piece], np.ndarray]]:
        """`tokenize`, chunk by chunk; a thread tokenizes the next chunk while one is used.

        Yields
        ------
        start : int
            The first row of the chunk; rows of pieces count from it.
        pieces, full_lengths
            As of `tokenize`.
        """
        with ThreadPoolExecutor(1) as executor:
            pieces, full_lengths = self.tokenize(
                texts[:chunk_size], max_length=max_length, windows=windows
            )
            for start in range(0, len(texts), chunk_size):
                next_texts = texts[start + chunk_size : start + 2 * chunk_size]
                if next_texts:
                    future = executor.submit(
                        self.tokenize, next_texts, max_length=max_length, windows=windows
                    )
                yield start, pieces, full_lengths
                if next_texts:
                    pieces, full_lengths = future.result()

    def spans(
        self, texts: list[str], *, max_length: int, windows: bool
    ) -> list[tuple[list[str], np.ndarray]]:
        """The pieces of each text that its tokens are, and where they begin and end in it.

        See `FrozenLLM.tokens`.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} of {self.model!r} can't map tokens to pieces of"
                " the text: only a fast tokenizer can."
            )
        result, limit = [], self.token_limit(max_length)
        encodings = itertools.chain.from_iterable(
            self._encode(texts[start : start + TOKENIZE_TEXTS], None if windows else limit)
            for start in range(0, len(texts), TOKENIZE_TEXTS)
        )
        for text, (ids, special, spans, shift) in zip(texts, encodings, strict=True):
            if not windows and len(ids) > limit:
                kept = self._kept_tokens(special, limit)
                ids, spans = [ids[i] for i in kept], [spans[i] for i in kept]
            spans = [(a + shift, b + shift) if b > a else (a, b) for a, b in spans]
            if not ids:
                ids, spans = [self.filler_id], [(0, 0)]
            names = self.tokenizer.convert_ids_to_tokens(ids)
            pieces = [
                text[begin:end] or name for (begin, end), name in zip(spans, names, strict=True)
            ]
            result.append((pieces, np.array(spans, dtype=np.int64)))
        return result

    def as_chat(self, texts: list[str]) -> list[str]:
        """Each text as a user's message, in the tokenizer's chat template."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {self.model!r} has no chat template: name a model that was"
                " tuned for chat, or pass chat_template=False."
            )
        turns = [[{"role": "user", "content": text}] for text in texts]
        chats = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        bos = tokenizer.bos_token or ""
        with self._locked():
            adds_bos = bool(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return [chat.removeprefix(bos) for chat in chats] if adds_bos else chats

    def _locked(self) -> AbstractContextManager[Any]:
        """A lock for slow tokenizers; a fast one is thread-safe without truncation and padding."""
        return nullcontext() if self.tokenizer.is_fast else self._lock

    @property
    def _truncates_left(self) -> bool:
        return getattr(self.tokenizer, "truncation_side", "right") == "left"

    def _encode(self, texts: list[str], limit: int | None) -> list[Encoding]:
        """Tokens of texts. With a limit, only a sufficient part of a long text is tokenized.

        A tokenizer takes 0.3 KB and 2.5 microseconds for a character, or 12 s for 5 MB of text.
        """
        tokenizer, left = self.tokenizer, self._truncates_left
        if limit is None:
            n_characters = max(map(len, texts), default=0)
        else:
            n_characters = TOKEN_CHARACTERS * limit + 2 * CUT_CHARACTERS
        parts = list(texts)
        encodings: dict[int, Encoding] = {}
        pending = list(range(len(texts)))
        while pending:
            for i in pending:
                text = texts[i]
                parts[i] = text[-n_characters:] if left else text[:n_characters]
            with self._locked():
                encoded = tokenizer(
                    [parts[i] for i in pending],
                    verbose=False,
                    return_special_tokens_mask=True,
                    return_offsets_mapping=tokenizer.is_fast,
                )
            for place, i in enumerate(pending):
                encoding = Encoding(
                    ids=encoded["input_ids"][place],
                    special=encoded["special_tokens_mask"][place],
                    spans=encoded["offset_mapping"][place] if tokenizer.is_fast else [],
                    shift=len(texts[i]) - len(parts[i]) if left else 0,
                )
                if (
                    limit is None
                    or len(parts[i]) == len(texts[i])
                    or self._is_sufficient(encoding, limit, n_characters)
                ):
                    encodings[i] = encoding
            pending = [i for i in pending if i not in encodings]
            n_characters *= 4
        return [encodings[i] for i in range(len(texts))]

    def _is_sufficient(self, encoding: Encoding, limit: int, n_characters: int) -> bool:
        """Whether the tokens that are kept lie far enough from where the text was cut."""
        if not encoding.spans:  # of a slow tokenizer
            return len(encoding.ids) >= limit + CUT_CHARACTERS
        if len(encoding.ids) < limit:
            return False
        spans = [
            encoding.spans[i]
            for i in self._kept_tokens(encoding.special, limit)
            if not encoding.special[i]
        ]
        if self._truncates_left:
            return all(begin >= CUT_CHARACTERS for begin, _ in spans)
        return all(end <= n_characters - CUT_CHARACTERS for _, end in spans)

    def _kept_tokens(self, special: list[int], limit: int) -> list[int]:
        """Which tokens of a text stay: the special ones around it, and those between that fit."""
        n_before, n_after = _count_special_ends(special)
        places = range(len(special))
        content = places[n_before : len(places) - n_after]
        room = max(0, limit - n_before - n_after)
        content = content[len(content) - room :] if self._truncates_left else content[:room]
        return [*places[:n_before], *content, *places[len(places) - n_after :]][:limit]

    def _windows(self, row: int, ids: list[int], special: list[int], limit: int) -> list[Piece]:
        """A long text's windows, each with the special tokens around it.

        The states of special tokens are kept at both ends of the text only.
        """
        n_before, n_after = _count_special_ends(special)
        content = ids[n_before : len(ids) - n_after]
        n_content, overlap = limit - n_before - n_after, limit // OVERLAP
        if n_content <= overlap:
            raise ValueError(
                f"Windows of {limit} tokens have no room for a text between the special tokens of"
                f" {self.model!r}: raise max_length."
            )
        starts = range(0, max(1, len(content) - overlap), n_content - overlap)
        pieces = []
        for start in starts:
            window = [
                *ids[:n_before],
                *content[start : start + n_content],
                *ids[len(ids) - n_after :],
            ]
            begin = n_before + overlap if start > 0 else 0
            end = len(window) if start == starts[-1] else len(window) - n_after
            pieces.append(Piece(row, np.array(window, dtype=np.int64), begin, end, len(starts)))
        return pieces


def _count_special_ends(special: list[int]) -> tuple[int, int]:
    """How many special tokens are before a text, and how many after it."""
    n_before = len(list(itertools.takewhile(bool, special)))
    n_after = len(list(itertools.takewhile(bool, reversed(special[n_before:]))))
    return n_before, n_after
