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
        self._include_stop = include_stop
        self._drop_space = tokenizer.strips_leading_space and not continues
        self._stops = [_Matcher(string) for string in stop if string]
        self._held = ""
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
            self.num_tokens += 1
            data = self._tokenizer.piece(token_id, skip_special=self._skip_special)
            if self._drop_space and data:
                self._drop_space = False
                data = data.removeprefix(b" ")
            shown += self._scan(self._decoder.decode(data))
        return shown

    def finish(self) -> str:
        """What was still held back, a torn character as U+FFFD; "" after a stop string."""
        if self.stopped:
            return ""
        text = self._scan(self._decoder.decode(b"", True))
        text += self._held
        self._held = ""
        return text

    def _scan(self, text: str) -> str:
        if not self._stops:
            return text
        start = len(self._held)
        text = self._held + text
        for end, char in enumerate(text[start:], start + 1):
            met = [matcher.string for matcher in self._stops if matcher.advance(char)]
            if met:
                self.stopped = True
                self.stop_string = max(met, key=len)
                self._held = ""
                return text[: end if self._include_stop else end - len(self.stop_string)]
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
