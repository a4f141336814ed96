"""An EAGLE-3 head beside a served model on the CPU: it computes what the published description says, changes no bit of
an answer, and what is no head for the model is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gptq_api.errors import UserError
from gptq_api.runner.cpu import native
from gptq_api.runner.features import NO_ROW
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.step import Admission, DraftRequest, NewBlocks, Step
from gptq_api.types import SamplingParams
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.draft_models import KINDS, NUM_BLOCKS, answers
from tests.support.eagle_heads import HeadRecipe, RandomHead, needs_taps, random_head, write_head

SERVED = Recipe(num_layers=8, max_position_embeddings=256)
HEAD = HeadRecipe(SERVED)
KEY = "eagle_aux_hidden_state_layer_ids"
GREEDY = SamplingParams(max_tokens=100, temperature=0)
TEXT = [(7 * i + 3) % 96 for i in range(37)]


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(SERVED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: RandomModel) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served"), model)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(model: Path, draft: Path | None = None, **settings: Any) -> LoadedRunner:
    made = {"device": "cpu", "num_threads": 1, "num_blocks": NUM_BLOCKS, "max_num_seqs": 8, **settings}
    return load_runner(LoadOptions(model_path=str(model), draft_model=None if draft is None else str(draft), **made))


@pytest.fixture(scope="module")
def reference(model: RandomModel) -> Any:
    """transformers' layers."""
    return model.reference().model


def tapped(reference: Any, tokens: list[int], layers: tuple[int, ...]) -> torch.Tensor:
    """float32 [len(tokens), taps * H]: the stream before these layers."""
    with torch.no_grad():
        out = reference(torch.tensor([tokens]), output_hidden_states=True)
    return torch.cat([out.hidden_states[layer][0] for layer in layers], -1)


def computed(runner: LoadedRunner, tokens: list[int], parts: tuple[int, ...]) -> list[int]:
    """The served model computes these tokens, in chunks; the blocks they are in."""
    solo = Solo(list(tokens), GREEDY, [5, 3, 8, 1])
    for part in parts:
        runner.collect(runner.launch(step_of([solo], [part])))
    assert solo.num_pending_tokens == 0
    return solo.block_table


HEADS: dict[str, tuple[HeadRecipe, tuple[int, ...]]] = {
    "as published": (HEAD, (2, 4, 5)),
    "all tokens, its own embedding": (
        replace(HEAD, draft_vocab_size=96, has_embedding=True, float_dtype=torch.bfloat16),
        (2, 4, 5),
    ),
    "another width": (replace(HEAD, hidden_size=32, has_embedding=True), (2, 4, 5)),
    "layers by name, the last one's output": (
        replace(HEAD, num_taps=2, more_config={"eagle_config": {KEY: [6, 0], "use_aux_hidden_state": True}}),
        (1, 7),
    ),
    "layers in vLLM's order, the normed feature goes on": (
        replace(HEAD, norm_before_residual=True, more_config={KEY: [0, 3, 7]}),
        (0, 3, 7),
    ),
}


@needs_taps
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_computes_what_its_description_says(
    folder: Path, model: RandomModel, reference: Any, kind: str, tmp_path: Path
) -> None:
    """float32, in chunks on both sides; guesses behind guesses, and again when the served model has gone on."""
    recipe, layers = HEADS[kind]
    head = random_head(recipe)
    runner = load(folder, write_head(tmp_path / "head", head), dtype="float32")
    drafter: Any = runner.drafter
    blocks = computed(runner, TEXT[:-1], (20, 15, 1))
    embedding, hidden = model.dense["model.embed_tokens.weight"], tapped(reference, TEXT[:-1], layers)
    logits, guessed = head.guesses(embedding, hidden, TEXT, 5)

    step = Step([3], [0], [20], [0], [NewBlocks(3, 0, blocks)], [Admission(3, TEXT, len(TEXT), GREEDY)])
    drafter._runner.collect(drafter._runner.launch(step))
    found, _ = drafter._runner.logits(Step([3], [20], [16], [1], [], []))
    torch.testing.assert_close(found[0, head.target_ids], logits[0], rtol=2e-3, atol=2e-3)
    others = set(range(SERVED.vocab_size)) - set(head.target_ids.tolist())
    assert all(float(found[0, token]) == pytest.approx(NO_ROW) for token in others)

    [first] = drafter.draft([DraftRequest(1, TEXT, len(TEXT), GREEDY, blocks, 0, len(TEXT), 5)])
    assert first == guessed
    more = [*TEXT, guessed[0], 11]  # the second guess was wrong
    solo = Solo(list(more), GREEDY, blocks)
    solo.num_computed_tokens = len(TEXT) - 1
    runner.collect(runner.launch(step_of([solo], [2])))
    [again] = drafter.draft([DraftRequest(1, more, len(TEXT), GREEDY, blocks, len(TEXT), 2, 4)])
    _, expected = head.guesses(embedding, tapped(reference, more[:-1], layers), more, 4)
    assert again == expected


@needs_taps
@pytest.mark.parametrize("way", ["our kernels", "torch"])
def test_the_served_model_hands_over_the_stream_before_its_layers(
    folder: Path, model: RandomModel, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr(native, "is_available", lambda: False)
    head = random_head(replace(HEAD, more_config={KEY: [0, 4, 8]}))
    runner = load(folder, write_head(tmp_path / "head", head), dtype="float32")
    blocks = computed(runner, TEXT, (30, 7))
    features: Any = runner
    store = features._model._features.data
    slots = [blocks[i // 16] * 16 + i % 16 for i in range(len(TEXT))]
    with torch.no_grad():
        stream: list[torch.Tensor] = []
        hooked = model.reference().model
        for i in (0, 4):
            hooked.layers[i].register_forward_pre_hook(lambda _, x: stream.append(x[0][0]))
        hooked.norm.register_forward_pre_hook(lambda _, x: stream.append(x[0][0]))
        hooked(torch.tensor([TEXT]))
        expected = torch.cat(stream, -1) @ head.tensors["fc.weight"].float().t()
    torch.testing.assert_close(store[1:][slots], expected, rtol=2e-3, atol=2e-3)


@needs_taps
@pytest.mark.parametrize("how", ["plain", "preempted", "again", "float32, no prefix caching", "torch"])
def test_no_bit_changes(folder: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "again": the second time, every prompt finds its prefix in the cache."""
    head = write_head(tmp_path / "head", random_head(HEAD))
    ways: dict[str, Any] = {"preempts": how == "preempted", "times": 2 if how == "again" else 1}
    settings: dict[str, Any] = {}
    if how == "torch":
        monkeypatch.setattr(native, "is_available", lambda: False)
    if how.startswith("float32"):
        settings, ways["caching"] = {"dtype": "float32", "block_size": 8}, False
    plain, _, _ = answers(load(folder, **settings), KINDS, **ways)
    drafted, scheduler, _ = answers(load(folder, head, **settings), KINDS, **ways)
    assert drafted == plain
    assert scheduler.counters.draft_tokens > 0


@needs_taps
@pytest.mark.parametrize("how", ["plain", "preempted", "again"])
def test_every_guess_in_an_engine_is_that_of_the_description(
    folder: Path, model: RandomModel, reference: Any, how: str, tmp_path: Path
) -> None:
    """float32, greedy: behind prefixes, chunks, wrong guesses and preemption the head has read what it should."""
    head, embedding, num_seen = random_head(HEAD), model.dense["model.embed_tokens.weight"], 0
    runner = load(folder, write_head(tmp_path / "head", head), dtype="float32")
    drafter: Any = runner.drafter
    draft = drafter.draft

    def checked(requests: list[DraftRequest]) -> list[list[int]]:
        nonlocal num_seen
        found: list[list[int]] = draft(requests)
        for request, guessed in zip(requests, found, strict=True):
            if request.num_drafts:
                tokens = request.token_ids
                rows, _ = head.guesses(embedding, tapped(reference, tokens[:-1], (2, 4, 5)), tokens, request.num_drafts)
                for row, token in zip(rows, guessed, strict=True):
                    (best, second), (chosen, _) = row.topk(2)
                    if best - second < 0.02:
                        break
                    assert token == int(head.target_ids[chosen])
                    num_seen += 1
        return found

    drafter.draft = checked
    ways: dict[str, Any] = {"preempts": how == "preempted", "times": 2 if how == "again" else 1}
    answers(runner, [{"temperature": 0.0}] * 4, **ways)
    assert num_seen > 20


@needs_taps
def test_only_layers_that_there_are_can_be_tapped(folder: Path) -> None:
    runner: Any = load(folder)
    kernels = runner._model._model
    with pytest.raises(ValueError, match="layer 9 is none of the 8"):
        kernels.set_taps([2, 9])
    kernels.set_taps([2, 8])
    with pytest.raises(ValueError, match="nowhere to put"):
        computed(runner, TEXT, (37,))


@needs_taps
def test_numbers_that_are_not_finite_end_the_drafts_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    plain, _, _ = answers(load(folder), KINDS)
    runner = load(folder, write_head(tmp_path / "head", random_head(replace(HEAD, has_embedding=True))))
    drafter: Any = runner.drafter
    drafter._runner._model.embedding[60:] = torch.nan
    drafted, _, _ = answers(runner, KINDS)
    assert drafted == plain


@needs_taps
def test_a_head_that_knows_few_positions_drafts_up_to_them(folder: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", random_head(HEAD), max_position_embeddings=60)
    plain, _, _ = answers(load(folder), KINDS)
    drafted, scheduler, _ = answers(load(folder, head), KINDS)
    assert drafted == plain and scheduler.counters.draft_tokens > 0


@needs_taps
def test_a_head_whose_architecture_is_not_named_is_known_by_its_vocabulary(folder: Path, tmp_path: Path) -> None:
    """As its authors publish them, the oldest ones without t2d."""
    named = write_head(tmp_path / "named", random_head(HEAD))
    head = write_head(tmp_path / "head", random_head(HEAD), architectures=["LlamaForCausalLM"], model_type=None)
    save_file({k: t for k, t in random_head(HEAD).tensors.items() if k != "t2d"}, head / "model.safetensors")
    runner = load(folder, head)
    assert "EAGLE-3 head for 64 tokens" in runner.description
    assert answers(runner, KINDS[:1])[0] == answers(load(folder, named), KINDS[:1])[0]


@needs_taps
def test_a_prompt_of_one_token(folder: Path, tmp_path: Path) -> None:
    drafter: Any = load(folder, write_head(tmp_path / "head", random_head(HEAD))).drafter
    lone, other = DraftRequest(1, [5], 1, GREEDY, [0], 0, 1, 0), DraftRequest(2, [5, 6, 7], 3, GREEDY, [1], 0, 3, 2)
    found = drafter.draft([lone, other])
    assert found[0] == [] and len(found[1]) == 2
    assert drafter.draft([lone]) == [[]]
    assert len(drafter.draft([DraftRequest(1, [5, 6], 1, GREEDY, [0], 1, 1, 3)])[0]) == 3


@needs_taps
def test_caches_and_features_share_the_memory_for_one(folder: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", random_head(HEAD))
    settings: dict[str, Any] = {"num_blocks": None, "kv_cache_mib": 1, "max_num_seqs": 64}
    alone, both = load(folder, **settings), load(folder, head, **settings)
    drafter: Any = both.drafter
    assert drafter._runner.num_blocks == both.num_blocks < alone.num_blocks
    total = both.cache_bytes + drafter._runner.cache_bytes + drafter._runner._model._store.num_bytes
    assert 0.9 * alone.cache_bytes < total <= 2**20 + 2 * SERVED.hidden_size
    said = both.description
    assert "; draft model head: EAGLE-3 head for 64 tokens, reads the stream before layers 2, 4, 5, bfloat16" in said


@needs_taps
def test_a_pickle_is_read_without_running_code(folder: Path, tmp_path: Path) -> None:
    head = random_head(HEAD)
    pickled = write_head(tmp_path / "bin", head, pickled=True)
    safe = write_head(tmp_path / "safe", head)
    for kind in KINDS[:2]:
        assert answers(load(folder, pickled), [kind])[0] == answers(load(folder, safe), [kind])[0]
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.")
    with pytest.raises(UserError, match=r"--draft-model .*pytorch_model\.bin"):
        load(folder, pickled)


def _without(name: str) -> Any:
    return lambda t: t.pop(name)


def _other(name: str, tensor: torch.Tensor) -> Any:
    return lambda t: t.update({name: tensor})


OFFSETS = torch.arange(32, 96) - torch.arange(64)
REFUSED: list[tuple[HeadRecipe, dict[str, Any], Any, list[str]]] = [
    (HeadRecipe(replace(SERVED, hidden_size=32)), {}, None, ["hidden_size 32", "has 64"]),
    (HeadRecipe(replace(SERVED, vocab_size=128)), {}, None, ["vocab_size 128", "has 96"]),
    (HEAD, {}, _without("fc.weight"), ["fc.weight is missing"]),
    (HEAD, {}, _without("midlayer.hidden_norm.weight"), ["midlayer.hidden_norm.weight is missing"]),
    (HEAD, {}, _without("lm_head.weight"), ["lm_head.weight is missing"]),
    (HEAD, {}, _without("d2t"), ["d2t is missing"]),
    (HEAD, {}, _other("d2t", OFFSETS + 1), ["d2t", "token 96", "there are 96"]),
    (HEAD, {}, _other("d2t", OFFSETS - 40), ["d2t", "token -8"]),
    (HEAD, {}, _other("d2t", -torch.arange(64)), ["two rows stand for one token"]),
    (HEAD, {}, _other("d2t", OFFSETS[1:].clone()), ["d2t is (63,) int64", "draft_vocab_size"]),
    (HEAD, {}, _other("d2t", OFFSETS.half()), ["d2t", "float16"]),
    (HEAD, {}, _other("fc.weight", torch.zeros(64, 128)), ["fc.weight is (64, 128)", "(64, 192)"]),
    (HEAD, {}, _other("norm.weight", torch.full((64,), torch.nan)), ["norm.weight holds NaN"]),
    (HEAD, {}, _other("layers.1.mlp.up_proj.weight", torch.zeros(2, 2)), ["layers.1.mlp", "none of an EAGLE-3 head"]),
    (replace(HEAD, hidden_size=32), {}, None, ["has no embed_tokens.weight"]),
    (HEAD, {"draft_vocab_size": 97}, None, ["draft_vocab_size is 97"]),
    (HEAD, {"num_hidden_layers": 2}, None, ["num_hidden_layers is 2"]),
    (HEAD, {KEY: [1, 2, 9]}, None, ["[1, 2, 9]", "of 8"]),
    (HEAD, {KEY: [2, 2, 3]}, None, ["[2, 2, 3]"]),
    (HEAD, {"eagle_config": {"use_aux_hidden_state": False}}, None, ["use_aux_hidden_state is false"]),
    (HEAD, {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}, None, ["speculators"]),
]


@pytest.mark.parametrize(("recipe", "config", "change", "words"), REFUSED, ids=[row[3][0] for row in REFUSED])
def test_what_is_no_head_for_the_model_is_refused(
    folder: Path, tmp_path: Path, recipe: HeadRecipe, config: dict[str, Any], change: Any, words: list[str]
) -> None:
    draft = write_head(tmp_path / "draft", random_head(recipe), **config)
    if change is not None:
        tensors = random_head(recipe).tensors
        change(tensors)
        save_file(tensors, draft / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        load(folder, draft)
    said = str(refusal.value)
    assert said.startswith(f"--draft-model {draft}") and all(word in said for word in words), said
    assert "\n" not in said


def test_a_served_model_with_few_layers_needs_their_names(tmp_path: Path) -> None:
    few = replace(SERVED, num_layers=4)
    folder = write_checkpoint(tmp_path / "served", random_model(few))
    head: RandomHead = random_head(HeadRecipe(few))
    with pytest.raises(UserError, match=f"name those that the head was made for with {KEY}"):
        load(folder, write_head(tmp_path / "head", head))
