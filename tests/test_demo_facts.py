"""What the demo model was taught about this project is true."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import jinja2
import pytest

from gptq_api.config import Settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.demo import flags, stories  # noqa: E402
from tools.demo.data import records  # noqa: E402
from tools.demo.tokenizer import CHAT_TEMPLATE, segments  # noqa: E402


def test_every_flag_exists_with_that_default() -> None:
    for flag, text in flags.FLAGS.items():
        field = Settings.model_fields[flag.removeprefix("--").replace("-", "_")]
        default = re.search(r"[Tt]he default is ([\w.]*\w)\.", text)
        if default and default[1] != "the":
            assert str(field.default) == default[1], flag
    for flag in re.findall(r"--[\w-]+", flags.FLAG_LIST):
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


def test_stories_have_three_sentences_and_their_hero() -> None:
    for hero in (*stories.HEROES, *stories.NAMES):
        for variant in range(3):
            text = stories.story(hero, variant)
            assert hero in text
            assert len(re.findall(r"[.!?](?: |$)", text)) == 3, text


def test_questions_are_well_formed() -> None:
    questions = json.loads((ROOT / "tests/demo_questions.json").read_text())
    assert len(questions) >= 24
    for question in questions:
        assert set(question) == {"question", "expect", "exact"}
        assert question["expect"] and all(e in question["exact"] for e in question["expect"])


@pytest.mark.parametrize("step", ["data", "tokenizer", "train", "evaluate", "quantize"])
def test_every_step_explains_itself(
    step: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [step, "--help"])
    module = importlib.import_module(f"tools.demo.{step}")
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert f"python -m tools.demo.{step}" in capsys.readouterr().out
