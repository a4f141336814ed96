"""`gptq-api verify`: what this machine makes of a checkpoint beside transformers' model of its dequantized weights."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gptq_api import exits
from gptq_api.cli.output import fail
from gptq_api.config import VerifySettings
from gptq_api.errors import UserError
from gptq_api.hub import local_model

if TYPE_CHECKING:
    from gptq_api.text.tokenizer import Tokenizer
    from gptq_api.verify.comparison import Comparison
    from gptq_api.verify.ours import Answered
    from gptq_api.verify.reference import Reference

_TEXTS = (
    "The library opened in the spring. Every morning the same three people waited at its door: a retired sailor, who "
    "read the newspapers from the back to the front, a student, and a woman who never said what she was looking for.",
    "Water boils at a lower temperature on a mountain than at the sea, since the air above it weighs less. A cook who "
    "does not know this wonders why the potatoes are still hard after twenty minutes.",
    "To quantize a weight is to round it to one of a few values. With four bits there are sixteen of them, and a scale "
    "for every group of weights says how far apart they are. What is lost by rounding one weight the next make up for.",
)
"""what is compared where --text names nothing"""


def run(settings: VerifySettings) -> int:
    """Exit status: 0 they agree, 1 they part, or there was nothing to compare (a sentence on stderr says where)."""
    try:
        facts, verdict = verify(settings)
    except UserError as error:
        fail("verify", error)
        return exits.FAILED
    print(json.dumps(facts, indent=2) if settings.json_output else _as_text(facts))
    if verdict is None:
        return exits.DONE
    sys.stdout.flush()
    fail("verify", verdict)
    return exits.FAILED


def verify(settings: VerifySettings) -> tuple[dict[str, Any], str | None]:
    """(the facts as JSON values, a sentence where something is wrong). Raises UserError."""
    import torch

    from gptq_api.checkpoint.checkpoint import CheckpointError
    from gptq_api.checkpoint.dense import dequantized
    from gptq_api.model.modules import config_of
    from gptq_api.runner.backends import backend_of, resolve_device
    from gptq_api.runner.load import make_runner, open_model
    from gptq_api.runner.options import LoadOptions
    from gptq_api.text.tokenizer import load_tokenizer
    from gptq_api.verify import ours
    from gptq_api.verify.comparison import compare, limit_of
    from gptq_api.verify.reference import Reference

    longest = settings.prompt_tokens + settings.num_tokens
    options = LoadOptions(
        model_path=local_model(settings.model_path, settings.revision, settings.gptq_ckpt),
        gptq_ckpt=settings.gptq_ckpt,
        device=settings.device,
        dtype=settings.dtype,
        num_threads=settings.num_threads,
        block_size=ours.BLOCK_SIZE,
        num_blocks=-(-longest // ours.BLOCK_SIZE),
        max_model_len=longest,
        max_num_seqs=1,
    )
    device, checkpoint = resolve_device(options.device), open_model(options)
    most = config_of(checkpoint).max_position_embeddings
    if longest > most:
        raise UserError(
            f"the model's context holds {most} tokens, and --prompt-tokens {settings.prompt_tokens} with --num-tokens "
            f"{settings.num_tokens} are {longest}; lower one of them"
        )
    tokenizer = load_tokenizer(checkpoint.folder)
    prompts = _prompts(settings, tokenizer, config_of(checkpoint).vocab_size)
    answered: list[Answered] = []
    try:
        runner = make_runner(options, checkpoint, device)
        answered = [ours.answer(runner, prompt, settings.num_tokens) for prompt in prompts]
        limit = limit_of(runner.dtype, "int8" in runner.description)
        facts = {"path": str(checkpoint.folder), "runs_on": runner.description, "limit": limit}
        del runner
    except CheckpointError as error:
        if "not finite" not in str(error):
            raise  # of what is not finite the reference finds the place
        facts, limit = {"path": str(checkpoint.folder), "refused": str(error)}, 0.0
    torch.cuda.empty_cache()  # where there is none, nothing
    reference = Reference(dequantized(checkpoint), device)
    facts["reference"] = (
        f"transformers, {str(reference.dtype).removeprefix('torch.')}, {backend_of(device).device_name(device)}"
    )
    if damage := _damage(reference, prompts[0]):
        return facts, damage
    if not answered:
        return facts, f"{facts['refused']}; transformers' are finite, so that this is our mistake: please report it"
    theirs = [reference.logits(text.token_ids) for text in answered]
    found = [
        compare(text.logits, logits, text.token_ids, text.num_prompt_tokens)
        for text, logits in zip(answered, theirs, strict=True)
    ]
    guess = _mean_loss(theirs, answered)
    facts |= {
        "texts": [asdict(comparison) for comparison in found],
        "perplexity": math.exp(min(guess, 700.0)),
        "vocab_size": theirs[0].shape[1],
    }
    return facts, _verdict(facts, found, answered, tokenizer)


def _prompts(settings: VerifySettings, tokenizer: Tokenizer, num_rows: int) -> list[list[int]]:
    from gptq_api.text.samples import encode_documents, read_documents, spread, windows

    if settings.text is None:
        texts = [tokenizer.encode(text, add_bos=True)[: settings.prompt_tokens] for text in _TEXTS]
        return [[token for token in text if token < num_rows] for text in texts]
    documents = encode_documents(read_documents(settings.text), settings.text, tokenizer, None, num_rows)
    found = windows(documents, settings.prompt_tokens)
    return spread(found, min(len(_TEXTS), len(found)))


def _damage(reference: Reference, prompt: list[int]) -> str | None:
    """A sentence where the reference's numbers overflow as well, and in which layer that begins."""
    layer = reference.first_layer_not_finite(prompt)
    if layer is None:
        return None
    return (
        f"transformers' numbers are not finite either, from layer {layer} on: its weights, or those before it, "
        "are far too large; the file is damaged, download it again"
    )


def _mean_loss(theirs: list[Any], answered: list[Answered]) -> float:
    """Of the prompts' tokens by the reference, nats."""
    import torch

    losses = []
    for logits, text in zip(theirs, answered, strict=True):
        targets = torch.tensor(text.token_ids[1 : text.num_prompt_tokens])
        losses.append(torch.nn.functional.cross_entropy(logits[: len(targets)], targets))
    return float(torch.stack(losses).mean())


def _verdict(
    facts: dict[str, Any], found: list[Comparison], answered: list[Answered], tokenizer: Tokenizer
) -> str | None:
    for number, (comparison, text) in enumerate(zip(found, answered, strict=True), 1):
        if comparison.largest_error > facts["limit"]:
            at = comparison.worst_position
            return (
                f"text {number} parts behind token {at} ({tokenizer.decode([text.token_ids[at]])!r}): its logits are "
                f"off by {comparison.largest_error:.1%} of their norm, and rounding explains {facts['limit']:.1%}"
            )
        for parting in comparison.partings:
            if not parting.is_tie:
                return (
                    f"text {number} parts at token {parting.position}: greedy decoding takes "
                    f"{tokenizer.decode([parting.ours])!r}, transformers {tokenizer.decode([parting.theirs])!r} by "
                    f"{parting.margin:.3f} logits"
                )
    return None


def _as_text(facts: dict[str, Any]) -> str:
    rows = [
        ("checkpoint", facts["path"]),
        ("ours", facts.get("runs_on") or facts["refused"]),
        ("theirs", facts["reference"]),
    ]
    for number, text in enumerate(facts.get("texts", []), 1):
        ties = sum(parting["is_tie"] for parting in text["partings"])
        equal = text["greedy_tokens"] - len(text["partings"])
        rows.append(
            (
                f"text {number}",
                f"logits off by {text['largest_error']:.2%} at most (token {text['worst_position']} of {text['rows']})"
                f", divergence {text['mean_divergence']:.1e} nats; best token the same in {text['same_best']} of "
                f"{text['rows']}; greedy {equal} of {text['greedy_tokens']}{f', {ties} ties' if ties else ''}",
            )
        )
    if "perplexity" in facts:
        rows.append(("limit", f"{facts['limit']:.1%} of the logits' norm, what rounding the activations explains"))
        rows.append(("perplexity", f"{facts['perplexity']:.2f} on these prompts, by transformers"))
        if facts["perplexity"] > facts["vocab_size"]:
            worse = "these prompts are predicted worse than by chance: a model that knows such texts is damaged then"
            rows.append(("warning", worse))
    return "\n".join(f"{name:<12}{value}" for name, value in rows)
