"""Who answers in `gptq-api chat`: the engine in this program's child process, or a server somewhere."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import msgspec

from gptq_api.api.answers.choice import Choice
from gptq_api.config import ChatSettings
from gptq_api.engine.client import EngineClient, EngineDead, EngineStalled, Prompt
from gptq_api.errors import UserError
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import TextProcess
from gptq_api.text.stream import TextStream
from gptq_api.types import SamplingParams

Message = dict[str, Any]


class ChatError(UserError):
    """One sentence for the user. `fatal`: there is nobody left to talk to."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


@dataclass
class Report:
    """What an answer turned out to be, filled in while it streams."""

    attempt: int = 0
    """how many answers to this question were thrown away; a seed that is given goes on from it"""
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    """drafted tokens that were the right ones; of a server nobody asks"""
    finish_reason: str | None = None
    num_dropped: int = 0
    """oldest messages of the conversation that were left out because the context is full"""


class ChatModel(Protocol):
    description: str
    """lines to show before the first prompt"""

    async def start(self) -> None: ...
    def answer(self, messages: list[Message], report: Report) -> AsyncIterator[str]: ...
    async def stop(self) -> None: ...


class LocalModel:
    """Loads the checkpoint and runs the engine as a child process."""

    def __init__(self, settings: ChatSettings) -> None:
        """Raises ChatError where there is no such checkpoint."""
        self._settings = settings
        try:
            folder = checkpoint_folder(settings.model_path)
        except UserError as error:
            raise ChatError(str(error), fatal=True) from None
        self._text = TextProcess(folder, template=settings.chat_template, model_name=settings.served_model_name or "")
        self._client = EngineClient(settings)
        self.description = ""

    async def start(self) -> None:
        starting = asyncio.ensure_future(self._client.start())
        try:
            self._tokenizer, self._template = await self._text.start()
            self._ready = await starting
        except BaseException as error:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self.stop()
            if isinstance(error, UserError):
                raise ChatError(str(error), fatal=True) from None
            raise
        warning = self._tokenizer.without_rows(self._ready.vocab_size)
        self.description = "\n".join(filter(None, (self._ready.description, self._template.source, warning)))

    async def stop(self) -> None:
        self._text.close()
        await self._client.stop()

    async def answer(self, messages: list[Message], report: Report) -> AsyncIterator[str]:
        """Text as it comes. Raises ChatError."""
        prompt = await self._fit(messages, report)
        room = self._ready.max_model_len - len(prompt)
        settings, tokenizer, template = self._settings, self._tokenizer, self._template
        ends = tokenizer.end_ids(self._ready.eos_token_ids, self._ready.vocab_size, template.stop_token_ids)
        params = SamplingParams(
            max_tokens=min(settings.max_tokens or room, room),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=random.getrandbits(31) if settings.seed is None else _seed(settings.seed, report),
            stop_token_ids=ends,
        )
        choice = Choice(0, 0, params, TextStream(tokenizer, stop=template.stop))
        try:
            with self._client.submit([Prompt(prompt, [params])]) as generation:
                async for (delta,) in generation:
                    pieces = choice.take(delta)
                    report.num_tokens, report.finish_reason = choice.num_tokens, choice.finish_reason
                    accepted, rejected = generation.drafted[0]
                    report.num_accepted, report.num_drafted = accepted, accepted + rejected
                    for piece in pieces:
                        if piece.text:
                            yield piece.text
                    if choice.finish_reason == "error":
                        damaged = "the model's output is not finite: this checkpoint or its quantization is damaged"
                        raise ChatError(damaged)
                    if choice.finish_reason is not None:
                        return
        except EngineStalled as error:
            raise ChatError(f"{error}; a step that takes longer needs a larger --engine-timeout-s") from None
        except EngineDead as error:
            raise ChatError(str(error), fatal=True) from None

    async def _fit(self, messages: list[Message], report: Report) -> list[int]:
        """The prompt, without as many of the oldest turns as it takes to leave room for an answer."""
        limit = self._ready.max_model_len
        room = min(self._settings.max_tokens or 256, max(limit // 4, 1))
        while True:
            try:
                prompt = await self._text.render(_without_oldest(messages, report.num_dropped))
                self._tokenizer.check_rows(prompt, self._ready.vocab_size)
            except UserError as error:
                raise ChatError(str(error)) from None
            if len(prompt) + room <= limit:
                return prompt
            if not _drop_turn(messages, report):
                if len(prompt) < limit:
                    return prompt
                raise ChatError(f"that is {len(prompt)} tokens, and the model's context holds {limit}")


class RemoteModel:
    """A server that speaks the OpenAI API."""

    def __init__(self, settings: ChatSettings) -> None:
        assert settings.url is not None
        self._settings = settings
        self._model = settings.served_model_name
        try:
            url = httpx.URL(settings.url.rstrip("/"))
        except httpx.InvalidURL as error:
            raise ChatError(f"--url {settings.url} is not an address ({error})", fatal=True) from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ChatError(f"--url {settings.url} is not an address: http://HOST:PORT/v1 is", fatal=True)
        base = url if url.path.strip("/") else url.copy_with(path="/v1")
        headers = {"authorization": f"Bearer {settings.api_key[0]}"} if settings.api_key else {}
        timeout = httpx.Timeout(None, connect=5.0)
        self._client = httpx.AsyncClient(base_url=base, headers=headers, timeout=timeout)
        self.description = ""

    async def start(self) -> None:
        url = self._settings.url
        try:
            response = await self._client.get("models", timeout=10.0)
            if response.is_error:
                told = _error_of(response.status_code, response.content)[0]
                key = "; here it is --api-key" if response.status_code == 401 else ""
                raise ChatError(f"{url} answers {told}{key}", fatal=True)
            models = [entry["id"] for entry in response.json()["data"]]
        except httpx.HTTPError as error:
            raise ChatError(f"{url} cannot be reached ({str(error) or type(error).__name__})", fatal=True) from None
        except (ValueError, KeyError, TypeError):
            raise ChatError(f"{url} does not speak the OpenAI API: {url}/models lists no models", fatal=True) from None
        self._model = self._model or next(iter(models), None)
        if self._model is None:
            raise ChatError(f"{url} serves no model", fatal=True)
        self.description = f"{self._model} at {url}"

    async def stop(self) -> None:
        await self._client.aclose()

    async def answer(self, messages: list[Message], report: Report) -> AsyncIterator[str]:
        """Text as it comes. Raises ChatError."""
        while True:
            body = self._body(_without_oldest(messages, report.num_dropped), report)
            try:
                async with self._client.stream("POST", "chat/completions", json=body) as response:
                    if response.status_code == 200:
                        async for text in _texts(response, report):
                            yield text
                        return
                    message, code = _error_of(response.status_code, await response.aread())
            except httpx.HTTPError as error:
                raise ChatError(f"the connection failed ({str(error) or type(error).__name__})") from None
            if code != "context_length_exceeded" or not _drop_turn(messages, report):
                raise ChatError(f"the server answers {message}")

    def _body(self, messages: list[Message], report: Report) -> dict[str, Any]:
        settings = self._settings
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": None if settings.seed is None else _seed(settings.seed, report),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return {key: value for key, value in body.items() if value is not None}


def _seed(given: int, report: Report) -> int:
    """Another one for each attempt, within 64 bits."""
    return (given + report.attempt + 2**63) % 2**64 - 2**63


class _Delta(msgspec.Struct):
    content: str | None = None


class _Chunk(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    """What is read of an event of any server; the rest is passed over."""

    choices: list[_Chunk] | None = None
    usage: _Usage | None = None
    error: Any = None


async def _texts(response: httpx.Response, report: Report) -> AsyncIterator[str]:
    """Contents of a stream of chat.completion.chunk events, up to `[DONE]`."""
    async for data in _events(response):
        if data == b"[DONE]":
            return
        try:
            event = msgspec.json.decode(data, type=_Event)
        except msgspec.DecodeError as error:
            raise ChatError(f"the server sent an event that is none of a chat ({error})") from None
        if event.error is not None:
            told = event.error.get("message") if isinstance(event.error, dict) else event.error
            raise ChatError(f"the server stopped: {told}")
        for choice in event.choices or []:
            report.finish_reason = choice.finish_reason or report.finish_reason
            if choice.delta is not None and choice.delta.content:
                report.num_tokens += 1  # a guess until the usage arrives, which is last
                yield choice.delta.content
        if event.usage is not None and event.usage.completion_tokens is not None:
            report.num_tokens = event.usage.completion_tokens
    raise ChatError("the server closed the connection in the middle of the answer")


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each server-sent event. Lines end with LF or CRLF only: U+2028 may stand in the text as it is."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _error_of(status: int, body: bytes) -> tuple[str, str | None]:
    """(status and message, code) of an error response, whatever shape its body has."""
    try:
        error = msgspec.json.decode(body)["error"]
        return f"{status}: {error['message']}", error.get("code")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return f"{status} {body[:200].decode(errors='replace')}".strip(), None


def _drop_turn(messages: list[Message], report: Report) -> bool:
    """Leave out one more turn (a question and its answer). False when only the last question is left."""
    num_turn_messages = len([message for message in messages if message["role"] != "system"])
    if num_turn_messages - report.num_dropped < 3:
        return False
    report.num_dropped += 2
    return True


def _without_oldest(messages: list[Message], num_dropped: int) -> list[Message]:
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    return system + turns[num_dropped:]
