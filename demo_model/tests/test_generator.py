"""What the demo model was taught about this project is true, and its chats follow from the seed."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys

import jinja2
import pytest
from demo_model import stories
from demo_model.data import records
from demo_model.known import FLAG_LIST, FLAGS, GENERAL, HOWTO, REFUSALS, SMALL_TALK, TERMS
from demo_model.tokenizer import CHAT_TEMPLATE, segments
from gptq_api.config import Settings


def test_every_flag_exists_with_that_default() -> None:
    """Fails when a default changes: from then on the model says what was true when it was trained."""
    for flag, text in FLAGS.items():
        field = Settings.model_fields[flag.removeprefix("--").replace("-", "_")]
        default = re.search(r"[Tt]he default is ([\w.]*\w)\.", text)
        if default and default[1] != "the":
            assert str(field.default) == default[1], flag
    for flag in re.findall(r"--[\w-]+", FLAG_LIST):
        assert flag == "--help" or flag.removeprefix("--").replace("-", "_") in Settings.model_fields
    assert Settings.model_fields["enable_prefix_caching"].default is True
    assert Settings.model_fields["api_key"].default == []
    assert Settings.model_fields["model_path"].default == "demo"


def test_generator_is_reproducible_and_speaks_the_template() -> None:
    items = records(7, 200)
    assert items == records(7, 200) != records(8, 200)
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    for item in items:
        if "messages" in item:
            text = template.render(messages=item["messages"], bos_token="<|begin|>")
            assert text == "".join(piece for piece, _ in segments(item))
            roles = [m["role"] for m in item["messages"] if m["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_the_phrases_are_the_ones_the_model_was_trained_on() -> None:
    """A changed phrase is a model to train again; then the numbers here follow."""
    assert (len(TERMS), len(HOWTO), len(SMALL_TALK), len(FLAGS), len(REFUSALS)) == (52, 27, 21, 26, 10)
    digest = hashlib.sha256(json.dumps(records(1, 2000)).encode()).hexdigest()
    assert digest == "a456daca7ccf280fa9d7627affe3513173314318bb1065c4051ec2432bcb7fd3"
    assert sum(refusal.answer == GENERAL for refusal in REFUSALS.values()) == 2


def test_stories_have_three_sentences_and_their_hero() -> None:
    for hero in (*stories.HEROES, *stories.NAMES):
        for variant in range(3):
            text = stories.story(hero, variant)
            assert hero in text
            assert len(re.findall(r"[.!?](?: |$)", text)) == 3, text


@pytest.mark.parametrize("step", ["data", "tokenizer", "train", "evaluate", "quantize"])
def test_every_step_explains_itself(
    step: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [step, "--help"])
    module = importlib.import_module(f"demo_model.{step}")
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert f"python -m demo_model.{step}" in capsys.readouterr().out
