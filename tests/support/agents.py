"""What tests of the Responses and Messages APIs share: templates that differ in what they take, work with no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

from gptq_api.api.answers.work import Work, admitted
from gptq_api.api.service import Service
from gptq_api.api.terms import Terms
from gptq_api.edge.request_log import RequestRecord
from gptq_api.engine.client import Prompt
from gptq_api.text.chat import TemplateFacts
from gptq_api.text.chat_template import ChatTemplate
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import TextProcess
from gptq_api.text.stream import TextStream
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from gptq_api.types import SamplingParams
from tests.support.hand_fed_engine import HandFedEngine

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
ALTERNATING = """{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}
{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if m.role != 'system' %}[{{ m.role }}] {{ m.content }}{% endif %}{% endfor %}"""


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_folder("demo"))


@cache
def template(jinja: str) -> TemplateFacts:
    return ChatTemplate(jinja, tokenizer(), source="a test").facts


@contextmanager
def work(stop: tuple[str, ...] = ()) -> Iterator[Work]:
    """One choice of a prompt of three tokens, whose pieces the test makes."""
    engine = HandFedEngine()
    service = Service(engine.settings, engine, TextProcess(checkpoint_folder("demo")), tokenizer(), None, "demo")  # type: ignore[arg-type]
    new_text = partial(TextStream, tokenizer(), stop=stop, continues=True)
    prompt = Prompt([1, 2, 3], [SamplingParams(max_tokens=20)])
    with admitted(service, RequestRecord("req"), [prompt], new_text, Terms()) as asked:
        yield asked
    service.close()
