"""Everything that crosses the socket between the API process and the engine process, and nothing else.

Frames are msgspec msgpack of these structs, tagged by type; token ids travel as packed little-endian int32 so that
a prompt of 20,000 tokens costs microseconds on either side. No pickle anywhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "error", "too_complex"]
"""`error`: this sequence failed inside the engine (non-finite logits, for one); `too_complex`: its grammar grew beyond
a limit. Neither is sent to a client as such."""


BACKGROUND = 10_000
"""Levels from here on are those of work that nobody waits for: it gives way at once to any below, and has what those
leave. No caller's level and priority add up to as much."""


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids -> packed int32, little-endian on every platform we run on."""
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """Packed int32 -> token ids."""
    return array("i", data).tolist()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is sampled. Already validated by the API process; the engine only asserts.

    The distribution of a position is made in this order: logit_bias, repetition / presence / frequency penalty, the
    grammar, temperature, min_p, top_k, top_p. `temperature == 0` is greedy and ignores the filters.
    """

    max_tokens: int
    """0: the prompt is computed, for its logprobs, and no token is told."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or less: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """Always set: the API process draws one where the client gave none. Sampling is a function of
    (seed, position, logits), so the text depends on who else is in the batch only as far as logits do: not on the CPU,
    and on CUDA in their last bits, which change a token only where the draw is as close as that."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the sequence with reason "stop"; holds the checkpoint's EOS ids unless ignore_eos. The stop token itself
    is reported as the last token."""
    min_tokens: int = 0
    """Stop tokens cannot be sampled before this many tokens were generated."""
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None
    """None: no logprobs; n >= 0: the sampled token's logprob and the n best."""
    prompt_logprobs: int | None = None
    """None: none; n >= 0: of each token of the prompt but the first, its logprob and the n best."""
    grammar: str = ""
    """What the tokens have to spell, in llguidance's own JSON (`gptq_api/grammar`); "": anything. Where it may not end
    yet, stop tokens cannot be sampled; where it has to, nothing else can."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log) of one position, from the raw logits before penalties and temperature."""

    logprob: float
    """of the sampled token"""
    top: list[tuple[int, float]]
    """the n most likely (token id, logprob), best first"""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log) of N consecutive tokens of a prompt, each given what stands before it, from the
    raw logits; packed, since a prompt has as many as tokens."""

    first: int
    """where in the prompt the first of them stands; 1 or more, for nothing comes before token 0"""
    logprobs: bytes
    """float32 [N]; NaN where the logits were not finite"""
    ranks: bytes
    """int32 [N], 1: no token is likelier"""
    top_ids: bytes
    """int32 [N, n]: the n most likely tokens, best first"""
    top_logprobs: bytes
    """float32 [N, n]"""

    def unpacked(self) -> Iterator[tuple[TokenLogprobs, int]]:
        """(log-probabilities, rank) of each token."""
        logprobs, ranks = array("f", self.logprobs).tolist(), unpack_ids(self.ranks)
        ids, values = unpack_ids(self.top_ids), array("f", self.top_logprobs).tolist()
        num_top = len(ids) // len(ranks)
        for i, (logprob, rank) in enumerate(zip(logprobs, ranks, strict=True)):
            part = slice(i * num_top, (i + 1) * num_top)
            yield TokenLogprobs(logprob, list(zip(ids[part], values[part], strict=True))), rank


class Add(msgspec.Struct, frozen=True, tag="add"):
    """API -> engine: sample this prompt as often as there are params; each sample is a sequence."""

    first_id: int
    """The id of the first sequence; the others have the ids that follow it."""
    prompt: bytes
    """`pack_ids` of the prompt, at least one token"""
    params: tuple[SamplingParams, ...]
    """one for each sequence, at least one"""
    cache_salt: bytes = b""
    """Prefix-cache blocks are shared only between equal salts."""
    priority: int = 0
    """Of one owner's the lowest number is served first; equal ones in the order of their arrival."""
    owner: bytes = b""
    """16 bytes that stand for whose it is, and tell nothing of them. Owners share seats, memory, and the prompts' part
    of a step."""
    level: int = 0
    """Between owners the lowest number is served first; equal ones in turn."""
    prediction: bytes = b""
    """`pack_ids` of what the answer may look like; empty: nobody has an idea. It changes no token: where it is right,
    the answer comes in fewer steps."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """API -> engine: forget these sequences at the next step. Unknown ids are ignored."""

    sequence_ids: tuple[int, ...]


class LinearFacts(msgspec.Struct, frozen=True):
    """Linears of the forward pass that are alike; one may be made of several modules, as of q, k and v."""

    kernel: str
    bits: str
    """of the modules in the checkpoint: "4"; "4 + 8" where they differ, "" where they are not quantized"""
    group_size: str
    """the same; "-1": one group"""
    num: int


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is, from its headers, its config and what loading decided; `gptq-api inspect` says more."""

    architecture: str
    """as people call it: "LLaMA", "Qwen3" """
    layout: str
    """"one safetensors file", for one"""
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    """without biases; a tied head counts once"""
    bits: dict[str, int]
    """bits of a quantized module, "4" -> how many modules; empty where nothing is quantized"""
    group_sizes: dict[str, int]
    """"128" -> how many modules; "-1": one group"""
    act_order: bool
    """of the first layer's modules"""
    kernels: dict[str, int]
    """kernel -> how many Linears it takes"""
    linears: tuple[LinearFacts, ...]
    """the same, by bits and group size as well"""
    weight_bytes: int
    kv_bytes_per_token: int


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """Engine -> API, once, after the model is loaded and warm."""

    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    device: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    description: str
    """One line for the log: the model, its quantization, the kernels in use, memory."""
    facts: ModelFacts | None = None
    checkpoint: str = ""
    """A digest that another checkpoint has not."""
    checkpoint_written: int = 0
    """Unix time of its newest file, seconds."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Engine -> API instead of Ready: one sentence for the user (file, tensor, remedy)."""

    message: str


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and running totals, as of one step."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
    num_prefix_queries: int
    """prompt tokens that were looked up in the prefix cache, in total"""
    num_prefix_hits: int
    """prompt tokens that were found there, in total"""
    num_batched_tokens: int
    """tokens computed by this step; 0 where there was none"""
    num_log_lines_dropped: int = 0
    """by the engine process, in total"""
    num_graphs: int = 0
    """CUDA graphs that are kept"""
    num_drafts: int = 0
    """times that tokens were drafted for a sequence in a step, in total"""
    num_draft_tokens: int = 0
    """tokens that were drafted, in total"""
    num_accepted_tokens: int = 0
    """of these, tokens that the sequences got, in total"""
    num_deferred: int = 0
    """of those that wait: for their grammar, and not for a place"""
    num_kv_events_dropped: int = 0
    """batches of KV events that were not published, in total"""


class StepOutput(msgspec.Struct, frozen=True, tag="step", kw_only=True):
    """Engine -> API, one per step, columnar: token i belongs to sequence_ids[i]. A sequence that got several tokens has
    as many entries, in their order.

    Without any entries when the engine comes to rest after a message that no step has answered, such as an abort.
    """

    sequence_ids: bytes
    """`pack_ids`, one entry per token"""
    tokens: bytes
    """`pack_ids`"""
    finished: dict[int, FinishReason]
    cached_tokens: dict[int, int]
    """sequence id -> prompt tokens served from the prefix cache; sent with the first token of a sequence"""
    logprobs: dict[int, TokenLogprobs]
    """by entry, where they were asked for"""
    stats: EngineStats
    prompt_logprobs: dict[int, PromptLogprobs] = {}
    """by sequence id, where they were asked for: those that this step computed. All of a prompt come before the first
    token, or with it."""
    admitted: dict[int, float] = {}
    """sequence id -> when the step was launched that computes its first tokens, time.monotonic(), which all processes
    of a machine share: of those that got a seat since the output before this one. One that was preempted gets another.
    """
    drafted: dict[int, tuple[int, int]] = {}
    """sequence id -> (accepted, rejected) of all tokens that were drafted for it by now: of those that had any in this
    step. A reader may leave before a sequence has finished."""
    predicted: dict[int, tuple[int, int]] = {}
    """the same of those that its `Add.prediction` suggested"""


ToEngine = Add | Abort
FromEngine = Ready | Failed | StepOutput
