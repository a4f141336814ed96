"""What the demo model was taught about this project is true, and its chats follow from the seed."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import re
import sys

import jinja2
import pytest
from demo_model import stories
from demo_model.data import records
from demo_model.known import FACTS, FLAG_LIST, FLAGS, GENERAL, HOWTO, REFUSALS, SMALL_TALK, TERMS, held_out, normal
from demo_model.memory_skills import NO_SHORTER, again_turn
from demo_model.phrasing import expand
from demo_model.skills import SKILLS
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
    assert (len(TERMS), len(HOWTO), len(SMALL_TALK), len(FLAGS)) == (52, 28, 23, 27)
    assert (len(REFUSALS), len(FACTS)) == (14, 101)
    digest = hashlib.sha256(json.dumps(records(1, 2000)).encode()).hexdigest()
    assert digest == "305690979014c082ce2705135b1b8aa36ba4ed2094f1dd5e1966a0e4ab9074c0"
    assert sum(refusal.answer == GENERAL for refusal in REFUSALS.values()) == 3


def test_no_question_that_measures_the_model_is_asked_in_training() -> None:
    measured = held_out()
    assert len(measured) > 270
    asked = {normal(m["content"]) for item in records(3, 4000) for m in item.get("messages", ()) if m["role"] == "user"}
    assert not asked & measured


def test_every_fact_is_asked_for_and_has_one_answer() -> None:
    """Slots are filled, choices made; one question in a few hundred may have two answers, such as "Is it safe?"."""
    rng = random.Random(11)
    newcomer = next(skill for _, skill in SKILLS if skill.__name__ == "newcomer_turn")
    found: dict[str, set[str]] = {}
    for _ in range(20_000):
        turn = newcomer(rng)
        assert turn.user and not re.search(r"[{}\[\]<>|]|  ", turn.user + turn.answer), turn
        found.setdefault(normal(turn.user), set()).add(turn.answer.lower())
    assert sum(len(answers) > 1 for answers in found.values()) < len(found) / 200
    answers = set().union(*found.values())
    assert all(fact.answer.lower() in answers for fact in FACTS if fact.about is None)
    assert all(len(fact.answer) < 190 for fact in FACTS)


def test_choices_in_patterns() -> None:
    rng = random.Random(1)
    assert {expand("[a|b[c|d]|] e [?|]", rng) for _ in range(200)} == {
        "a e?",
        "a e",
        "bc e?",
        "bc e",
        "bd e?",
        "bd e",
    } | {
        "e?",
        "e",
    }


def test_the_last_answer_again_and_its_first_sentence() -> None:
    rng = random.Random(2)
    assert {again_turn(rng, "One. Two.").answer for _ in range(50)} == {"One. Two.", "One."}
    assert {again_turn(rng, "1, 2, 3").answer for _ in range(50)} == {"1, 2, 3", NO_SHORTER}


def test_sums_and_products_are_right() -> None:
    rng = random.Random(4)
    sums = next(skill for _, skill in SKILLS if skill.__name__ == "sum_turn")
    equations = [m for _ in range(5000) if (m := re.fullmatch(r"(\d+) ([*+-]) (\d+) = (-?\d+)\.", sums(rng).answer))]
    for a, sign, b, result in (m.groups() for m in equations):
        x, y = int(a), int(b)
        assert int(result) == (x + y if sign == "+" else x - y if sign == "-" else x * y)
    assert (
        {(x, y) for x in range(21) for y in range(21)}
        > {(int(m[1]), int(m[3])) for m in equations if m[2] == "*"}
        > {(17, 3)}
    )


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
