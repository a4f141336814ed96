"""Text for calibration and perplexity: a file becomes documents, documents become windows of token ids.

A `.jsonl` file holds one document per line, `{"text": "..."}` or `{"messages": [...]}` (rendered with the checkpoint's
chat template). Any other file is one document, or several where lines say `<|endoftext|>`. Every document begins as
the model's prompts begin (BOS, if it uses one); a long one goes on in the next window without, as in the published
perplexities.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_api.errors import UserError
from gptq_api.text.chat import ChatTemplateError
from gptq_api.text.chat_template import ChatTemplate
from gptq_api.text.tokenizer import Tokenizer
from gptq_api.text.tokens import NoRowError

_SEPARATOR = "<|endoftext|>"

Document = str | list[dict[str, Any]]
"""a text, or the messages of a chat"""


class SamplesError(UserError):
    """A text cannot be used: one sentence that names the file and the remedy."""


def read_documents(path: Path) -> list[Document]:
    """SamplesError where the file cannot be read, is no text, or holds nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SamplesError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SamplesError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    documents: list[Document] = []
    if path.suffix == ".jsonl":
        documents += [
            _from_json(line, f"{path} line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    else:
        part: list[str] = []
        for line in [*text.splitlines(keepends=True), _SEPARATOR]:
            if line.strip() == _SEPARATOR:
                documents.append("".join(part).strip())
                part = []
            else:
                part.append(line)
    documents = [document for document in documents if document]
    if not documents:
        raise SamplesError(f"{path} holds no text")
    return documents


def _from_json(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SamplesError(f"{where} is not valid JSON ({error})") from None
    if isinstance(value, dict):
        text, messages = value.get("text"), value.get("messages")
        if isinstance(text, str):
            return text
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return messages
    raise SamplesError(f'{where} has neither "text" (a string) nor "messages" (a list of objects)')


def encode_documents(
    documents: list[Document], path: Path, tokenizer: Tokenizer, template: ChatTemplate | None, num_rows: int
) -> list[list[int]]:
    """Token ids of each document of the file `path`, for a model of so many rows; the template is for chats.

    Raises SamplesError.
    """
    encoded = []
    for document in documents:
        try:
            if isinstance(document, str):
                ids = tokenizer.encode(document, add_bos=True)
            else:
                assert template is not None
                ids = template.render(document, add_generation_prompt=False)
            tokenizer.check_rows(ids, num_rows)
        except ChatTemplateError as error:
            raise SamplesError(f"{path} holds a chat that the template refuses: {error}") from None
        except NoRowError as error:
            raise SamplesError(f"{path} cannot be used: {error}") from None
        encoded.append(ids)
    return encoded


def windows(documents: list[list[int]], length: int) -> list[list[int]]:
    """Documents cut into windows of `length` tokens; what is left of each is a shorter one, if it has 2 or more."""
    cut = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
    return [window for window in cut if len(window) > 1]


def hold_out(found: list[list[int]], num_eval: int) -> tuple[list[list[int]], list[list[int]]]:
    """(what comes before, the last `num_eval` windows)."""
    return found[: max(0, len(found) - num_eval)], found[max(0, len(found) - num_eval) :]


def spread(found: list[list[int]], num: int) -> list[list[int]]:
    """`num` windows evenly spread over those found; there must be as many."""
    return [found[i * len(found) // num] for i in range(num)]
