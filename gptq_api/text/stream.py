"""Tokens in, text that may be shown out: incremental decoding and stop strings.

Text is held back for two reasons only: the last bytes may be the start of a character, the last characters may be the
start of a stop string. What is shown is therefore never taken back, and the pushes together are exactly the one-shot
decoding, however the tokens were grouped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gptq_api.text.tokenizer import Tokenizer


class TextStream:
    """One generation. O(1) per token: every token's bytes go once through a UTF-8 decoder and one automaton per stop.

    A stop string is met by the character that completes it; where two are completed at once, the longer one counts.
    Stop strings are looked for in the generated text only, control tokens excluded when they are skipped.
    `continues`: the text goes on where a prompt ended, so the leading space that some tokenizers drop belongs to it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip_special = skip_special
        self.include_stop = include_stop
        """whether what ended the text belongs to it"""
        self._drop_space = tokenizer.strips_leading_space and not continues
        self._stops = [_Matcher(string) for string in stop if string]
        self._held = ""
        self._num_chars = 0  # of all tokens taken in
        self.stopped = False
        """a stop string was met; push returns "" from then on"""
        self.stop_string: str | None = None
        """the one that was met"""
        self.num_tokens = 0
        """tokens taken in, the one that completed a stop string included, later ones not"""

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is safe to show, "" when there is none yet."""
        shown = ""
        for token_id in token_ids:
            if self.stopped:
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
        data = self._tokenizer.piece(token_id, skip_special=self._skip_special)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        text = self._decoder.decode(data)
        self._num_chars += len(text)
        return self._scan(text) if self._stops else text

    def finish(self) -> str:
        """What was still held back, a torn character as U+FFFD; "" after a stop string."""
        if self.stopped:
            return ""
        text = self._decoder.decode(b"", True)
        if self._stops:
            text = self._scan(text) + self._held
        self._held = ""
        return text

    def _scan(self, text: str) -> str:
        """What may be shown of what was held back and `text`, which follows it."""
        start = len(self._held)
        text = self._held + text
        for end, char in enumerate(text[start:], start + 1):
            met = [matcher.string for matcher in self._stops if matcher.advance(char)]
            if met:
                self.stopped = True
                self.stop_string = max(met, key=len)
                self._held = ""
                return text[: end if self.include_stop else end - len(self.stop_string)]
        keep = len(text) - max(matcher.matched for matcher in self._stops)
        self._held = text[keep:]
        return text[:keep]


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
