"""A draft model beside a served one on the CPU: the same answers to the last bit, in fewer steps where it is right; and
what cannot draft is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.engine.draft_vocabulary import check_vocabulary
from gptq_api.errors import UserError
from gptq_api.grammar.compile import regex
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.step import DraftRequest
from gptq_api.types import SamplingParams
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.draft_models import KINDS, NUM_BLOCKS, NUM_TOKENS, answers

SERVED = Recipe(max_position_embeddings=256)
DENSE = replace(SERVED, seed=1, num_layers=1, dense=("_proj",), float_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served"), random_model(SERVED))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense"), random_model(DENSE))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(model: Path, draft: Path | None = None, **settings: Any) -> LoadedRunner:
    made = {"device": "cpu", "num_threads": 1, "num_blocks": NUM_BLOCKS, "max_num_seqs": 8, **settings}
    return load_runner(LoadOptions(model_path=str(model), draft_model=None if draft is None else str(draft), **made))


@pytest.mark.parametrize("how", ["plain", "preempted", "again"])
@pytest.mark.parametrize("draft", ["itself", "another, dense"])
def test_no_bit_changes(folder: Path, dense: Path, draft: str, how: str) -> None:
    ways: dict[str, Any] = {"preempts": how == "preempted", "times": 2 if how == "again" else 1}
    plain, _, num_plain = answers(load(folder), KINDS, **ways)
    runner = load(folder, folder if draft == "itself" else dense)
    drafted, scheduler, num_steps = answers(runner, KINDS, **ways)
    assert drafted == plain
    counters = scheduler.counters
    assert counters.draft_tokens > 0
    if draft == "itself" and how != "preempted":
        assert counters.accepted_tokens == counters.draft_tokens, "seeds and penalties are the draft model's too"
        assert num_steps < 0.6 * num_plain


def test_itself_as_a_draft_model_fills_every_row(folder: Path) -> None:
    runner = load(folder, folder)
    [answer], scheduler, num_steps = answers(runner, [{"temperature": 1.0}])
    assert len(answer.tokens) == NUM_TOKENS and num_steps <= 1 + -(-NUM_TOKENS // 8) + 2
    assert scheduler.counters.accepted_tokens > 30


def test_another_dtype_and_no_prefix_caching(folder: Path, dense: Path) -> None:
    plain, _, _ = answers(load(folder, dtype="float32", block_size=8), KINDS, caching=False)
    drafted, scheduler, _ = answers(load(folder, dense, dtype="float32", block_size=8), KINDS, caching=False)
    assert drafted == plain and scheduler.counters.draft_tokens > 0


def test_nothing_is_drafted_in_a_grammar(folder: Path) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0.0, "grammar": regex("[ab]{12}")}, {"temperature": 0.0}]
    plain, _, _ = answers(load(folder), kinds)
    drafted, _, _ = answers(load(folder, folder), kinds)
    assert drafted == plain and plain[0].finish


def test_a_draft_model_that_knows_fewer_positions_drafts_up_to_them(folder: Path, tmp_path: Path) -> None:
    short = write_checkpoint(tmp_path / "short", random_model(replace(SERVED, max_position_embeddings=60)))
    plain, _, _ = answers(load(folder), KINDS)
    drafted, scheduler, _ = answers(load(folder, short), KINDS)
    assert drafted == plain and scheduler.counters.draft_tokens > 0


def test_a_draft_model_with_fewer_rows_says_nothing_of_the_others(folder: Path, tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small", random_model(replace(SERVED, vocab_size=90)))
    large = write_checkpoint(tmp_path / "large", random_model(replace(SERVED, vocab_size=128)))
    plain, _, _ = answers(load(folder), KINDS)
    for draft in (small, large):
        drafted, _, _ = answers(load(folder, draft), KINDS)
        assert drafted == plain


def test_numbers_that_are_not_finite_end_the_drafts_and_nothing_else(folder: Path) -> None:
    plain, _, _ = answers(load(folder), KINDS)
    runner = load(folder, folder)
    drafter: Any = runner.drafter
    model = drafter._runner._model
    model.embedding[60:] = torch.nan
    drafted, _, _ = answers(runner, KINDS)
    assert drafted == plain


def test_both_caches_share_the_memory_for_one(folder: Path, dense: Path) -> None:
    settings: dict[str, Any] = {"num_blocks": None, "kv_cache_mib": 1, "max_num_seqs": 64}
    alone, both = load(folder, **settings), load(folder, dense, **settings)
    drafter: Any = both.drafter
    assert drafter._runner.num_blocks == both.num_blocks < alone.num_blocks
    total = both.cache_bytes + drafter._runner.cache_bytes
    assert 0.9 * alone.cache_bytes < total <= 2**20
    assert "; draft model " in both.description and "unquantized" in both.description


def test_a_drafter_gives_its_seats_in_turn(folder: Path) -> None:
    """Five sequences, four seats: who comes again is told anew what it has."""
    drafter: Any = load(folder, folder).drafter
    params = SamplingParams(max_tokens=100, temperature=0)
    texts = [[5 + i] * 6 for i in range(5)]
    for _ in range(3):
        for i, text in enumerate(texts):
            tables = [2 * i, 2 * i + 1]
            [found] = drafter.draft([DraftRequest(i, text, 6, params, tables, 0, len(text), 3)])
            [again] = drafter.draft([DraftRequest(i, text, 6, params, tables, len(text) - 1, 1, 3)])
            assert found == again and len(found) == 3
            text += found[:2]
    assert len(drafter._seated) == drafter.max_seqs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"missing": True}, ["does not exist"]),
        ({"no config": True}, ["config.json"]),
        ({"no weights": True}, ["holds no"]),
        ({"recipe": replace(SERVED, vocab_size=2000)}, ["vocabulary of 2000", "of 96"]),
        ({"config": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}}, ["GPT2"]),
        ({"tensors": "model.norm.weight"}, ["model.norm.weight", "missing"]),
    ],
    ids=str,
)
def test_what_cannot_draft_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    draft = tmp_path / "draft"
    model = random_model(change.get("recipe", DENSE))
    tensors = {name: tensor for name, tensor in model.tensors().items() if name != change.get("tensors")}
    if not change.get("missing"):
        write_checkpoint(draft, model, tensors=tensors, **change.get("config", {}))
    if change.get("no config"):
        (draft / "config.json").unlink()
    if change.get("no weights"):
        (draft / "model.safetensors").unlink()
    with pytest.raises(UserError) as refusal:
        load(folder, draft)
    said = str(refusal.value)
    assert said.startswith(f"--draft-model {draft}") and all(word in said for word in words), said
    assert "\n" not in said


def test_other_tokens_are_refused_by_their_names(folder: Path, tmp_path: Path) -> None:
    def check(model: Path, draft: Path) -> None:
        check_vocabulary(LoadOptions(model_path=str(model), draft_model=str(draft)))

    small = write_checkpoint(tmp_path / "small", random_model(replace(SERVED, vocab_size=90)))
    with pytest.raises(UserError, match="another vocabulary: it has 90 tokens, the served model 96"):
        check(folder, small)
    check(folder, folder)
    demo, other = tmp_path / "demo", tmp_path / "other"
    from gptq_api.demo import DEMO_PATH

    for copy in (demo, other):
        shutil.copytree(DEMO_PATH, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    check(demo, other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[500:502]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another vocabulary: token 500 is"):
        check(demo, other)
