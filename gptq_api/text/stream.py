"""Tokens in, text that may be shown out: incremental decoding and stop strings.

Text is held back for two reasons only: the last bytes may be the start of a character, the last characters may be the
start of a stop string. What is shown is therefore never taken back, and the pushes together are exactly the one-shot
decoding, however the tokens were grouped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gptq_api.text.tokens import Tokens


class TextStream:
    """One generation. O(1) per token: every token's bytes go once through a UTF-8 decoder and one automaton per stop.

    A stop string is met by the character that completes it; where two are completed at once, the longer one counts.
    Stop strings are looked for in the generated text only, control tokens excluded when they are skipped.
    `continues`: the text goes on where a prompt ended, so the leading space that some tokenizers drop belongs to it.
    `shown`: control tokens that stand in the text by their names although the others are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokens,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        continues: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip_special = skip_special
        self._shown = shown
        self.include_stop = include_stop
        """whether what ended the text belongs to it"""
        self._drop_space = tokenizer.strips_leading_space and not continues
        self._stops = StopScan(stop, include_stop) if any(stop) else None
        self._num_chars = 0  # of all tokens taken in
        self.num_tokens = 0
        """tokens taken in, the one that completed a stop string included, later ones not"""

    @property
    def stopped(self) -> bool:
        """A stop string was met; push returns "" from then on."""
        return self._stops is not None and self._stops.met is not None

    @property
    def stop_string(self) -> str | None:
        """The one that was met."""
        return None if self._stops is None else self._stops.met

    @property
    def num_chars(self) -> int:
        """Characters of all tokens taken in, what is held back included."""
        return self._num_chars

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is safe to show, "" when there is none yet."""
        shown = ""
        for token_id in token_ids:
            if self._stops is not None and self._stops.met is not None:
                break
            shown += self._take(token_id)
        return shown

    def push_token(self, token_id: int) -> tuple[str, int, int]:
        """`push`, and where the token's own text begins and ends, in characters of the whole text, what is held back
        included. A character that the token leaves torn counts as its last one and as the next token's first.

        Not after a stop string.
        """
        start = self._num_chars
        shown = self._take(token_id)
        torn = bool(self._decoder.getstate()[0])
        return shown, start, self._num_chars + torn

    def _take(self, token_id: int) -> str:
        self.num_tokens += 1
        skip = self._skip_special and token_id not in self._shown
        data = self._tokenizer.piece(token_id, skip_special=skip)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        text = self._decoder.decode(data)
        self._num_chars += len(text)
        return text if self._stops is None else self._stops.push(text)

    def finish(self) -> str:
        """What was still held back, a torn character as U+FFFD; "" after a stop string."""
        if self.stopped:
            return ""
        text = self._decoder.decode(b"", True)
        return text if self._stops is None else self._stops.push(text) + self._stops.finish()


class StopScan:
    """Looks for stop strings in a text as it comes; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        """`include`: whether what ended the text belongs to it."""
        self._include = include
        self._matchers = [_Matcher(string) for string in stop if string]
        self._held = ""
        self.met: str | None = None
        """the stop string that was met; nothing may be pushed behind it"""
        self.num_surplus = 0
        """characters that were pushed and are not part of the text: what was met, unless included, and what followed"""

    def push(self, text: str) -> str:
        """What may be shown of what was held back and `text`, which follows it."""
        start = len(self._held)
        text = self._held + text
        for end, char in enumerate(text[start:], start + 1):
            met = [matcher.string for matcher in self._matchers if matcher.advance(char)]
            if met:
                self.met = max(met, key=len)
                self._held = ""
                shown = text[: end if self._include else end - len(self.met)]
                self.num_surplus = len(text) - len(shown)
                return shown
        keep = len(text) - max((matcher.matched for matcher in self._matchers), default=0)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What is held back, when the text has ended; a text pushed after this is another one."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return held


class _Matcher:
    """Knuth-Morris-Pratt: how much of `string` the text so far ends with, one character at a time.

    Independent of how long stop strings are and of how often they nearly match, which a search per token is not.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._borders = [0] * len(string)
        length = 0
        for i in range(1, len(string)):
            while length and string[i] != string[length]:
                length = self._borders[length - 1]
            length += string[i] == string[length]
            self._borders[i] = length

    def advance(self, char: str) -> bool:
        """Takes the next character; True when it completes the string (the matcher is then spent)."""
        while self.matched and char != self.string[self.matched]:
            self.matched = self._borders[self.matched - 1]
        self.matched += char == self.string[self.matched]
        return self.matched == len(self.string)
