"""Fields of this server that other companies' APIs do not have, under the names of the chat completion request."""

from __future__ import annotations

from typing import Any

from gptq_api.api.requests.fields import Body, CountOrZero, Name, Penalty, Repetition, Seed, Share
from gptq_api.api.requests.serving import Priority, Timeout


class OwnFields(Body):
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    seed: Seed | None = None
    """The same seed gives the same text, whoever else is being served (on a GPU: but for ties within rounding)."""
    min_tokens: CountOrZero | None = None
    priority: Priority | None = None
    """The lowest number is served first. Default 0; the header `X-Priority` says it too."""
    timeout: Timeout | None = None
    """Seconds for waiting, prompt and answer together, as in chat completions; the header `X-Request-Timeout` says it
    too."""
    ignore_eos: bool | None = None
    cache_salt: Name | None = None
    """Prompts share cached prefixes only with equal salts (and, always, equal API keys)."""

    def own(self) -> dict[str, Any]:
        """Those that were given."""
        names = OwnFields.model_fields
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
