"""The forward pass on CUDA: fused kernels, buffers that stay where they are.

Nothing here waits for the device, allocates (but for modules on the reference path, o's sorted inputs, and a quantized
head whose size is no multiple of 8) or looks at the numbers in a tensor, so that a step can be captured into a CUDA
graph. The residual stream has the activations' type. Permutations of act-order checkpoints are applied by whoever
writes a Linear's input; by the attention in decode steps of few rows only, otherwise o sorts what comes from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_api.kernels import gemm, ops
from gptq_api.kernels.decode_attention import RotaryInputs, decode_attention, decode_attention_workspace
from gptq_api.kernels.exchange import Exchange, Place
from gptq_api.kernels.head import head as head_product
from gptq_api.kernels.order import of_kernel, of_producer
from gptq_api.kernels.prefill_attention import prefill_attention
from gptq_api.kernels.row_groups import RowGroups
from gptq_api.model.layers.linear import Linear
from gptq_api.model.layers.norm import RMSNorm
from gptq_api.model.shard import UNIT, Shard
from gptq_api.model.weights import LayerWeights, LlamaWeights
from gptq_api.runner.cuda.linear import CudaDenseLinear, PackedGateUp, PackedGPTQLinear, PackedHead
from gptq_api.runner.features import Features
from gptq_api.runner.inputs import StepInputs

SCATTER_MAX_ROWS = 8
"""of a decode step, up to which the attention stores its results in o's order: beyond, a gather costs less"""


MAX_DRAFT_ROWS = gemm.DECODE_MAX_M
"""of a step with drafts: up to so many, a product gives a row the same bits"""


def of_cublas(model: LlamaWeights) -> list[str]:
    """The Linears in which a row's bits depend on how many rows there are."""
    names = [
        f"{name} of layer {i}"
        for i, layer in enumerate(model.layers)
        for name in ("qkv", "o", "gate_up", "down")
        if not isinstance(getattr(layer, name), PackedGPTQLinear | PackedGateUp)
    ]
    return names if isinstance(model.lm_head, PackedGPTQLinear | CudaDenseLinear) else [*names, "the head"]


@dataclass(frozen=True)
class _Layer:
    """LayerWeights with what its kernels want to know, in their types."""

    input_norm: Tensor
    """[H], like post_attention_norm in the order in which the Linear behind it takes its inputs"""
    input_order: Tensor | None
    """int32 [H], that order; None: as they are"""
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None
    o: Linear
    o_sorted: Linear
    """o for inputs in its own order"""
    o_index: Tensor | None
    """int32 [heads * D]: where in that order each output of the attention stands; None: where it is"""
    post_attention_norm: Tensor
    gate_up_order: Tensor | None
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, layer: LayerWeights, dtype: torch.dtype) -> _Layer:
        norms, order, o_sorted = layer.head_norm, of_kernel(layer.o.order), layer.o
        if order is not None:
            assert isinstance(layer.o, PackedGPTQLinear)
            o_sorted = layer.o.in_order()
        return cls(
            input_norm=in_type(layer.input_norm, dtype, of_producer(layer.qkv.order)),
            input_order=of_producer(layer.qkv.order),
            qkv=layer.qkv,
            q_norm=None if norms is None else norms.q_weight.to(dtype).contiguous(),
            k_norm=None if norms is None else norms.k_weight.to(dtype).contiguous(),
            window=layer.window,
            o=layer.o,
            o_sorted=o_sorted,
            o_index=None if order is None else torch.argsort(order).to(torch.int32),
            post_attention_norm=in_type(layer.post_attention_norm, dtype, of_producer(layer.gate_up.order)),
            gate_up_order=of_producer(layer.gate_up.order),
            gate_up=layer.gate_up,
            down=layer.down,
        )

    def for_prompts(self) -> _Layer:
        """With Linears for many rows, whose bits do not depend on how many."""

        def of(linear: Linear) -> Linear:
            return linear.for_prompts() if isinstance(linear, PackedGPTQLinear | PackedGateUp) else linear

        o, o_sorted, down = of(self.o), of(self.o_sorted), of(self.down)
        return replace(self, qkv=of(self.qkv), o=o, o_sorted=o_sorted, gate_up=of(self.gate_up), down=down)


def in_type(norm: RMSNorm, dtype: torch.dtype, perm: Tensor | None = None) -> Tensor:
    """Its weight [H], in the order in which it is wanted."""
    weight = norm.weight.to(dtype)
    return weight if perm is None else weight[perm.long()]


@dataclass(frozen=True)
class Context:
    """What each sequence of a step attends to."""

    block_tables: Tensor
    lengths: Tensor
    query_start: Tensor
    tiles: Tensor | None
    """of sequences of several rows; None: there are none"""
    groups: Tensor | None
    """of rows of one sequence that count as sequences; None: there are none"""

    @classmethod
    def of(cls, inputs: StepInputs[Tensor], by_row: bool, drafted: bool) -> Context:
        """`by_row`: as if each row were a sequence, so that one kernel attends, in the order of a decode step. With
        `drafted` they are sequences already."""
        if not by_row:
            tiles = inputs.tiles if len(inputs.tiles) else None
            groups = inputs.groups if drafted else None
            return cls(inputs.block_tables, inputs.context_lens, inputs.query_start, tiles, groups)
        rows = torch.arange(len(inputs.positions) + 1, dtype=torch.int32, device=inputs.positions.device)
        sequence = torch.searchsorted(inputs.query_start[1:], rows[:-1], right=True)
        sequence = sequence.clamp_(max=len(inputs.block_tables) - 1)  # padding, whose length is 0
        tables = inputs.block_tables.index_select(0, sequence)
        return cls(tables, inputs.positions + 1, rows, None, None)


SCORED_ROWS = 64
"""whose logits ranks exchange at a time, where they are not those that a step samples from"""


class _Ranks:
    """What the ranks of a model exchange within a step, and where each leaves its part of it."""

    def __init__(
        self, exchange: Exchange, x: Tensor, attended: Tensor, gated: Tensor, logits: Tensor, scored: list[Tensor]
    ) -> None:
        """Of all columns, on every rank. `attended` is in as many parts as there are ranks, the others as `Shard.of`
        has it. `scored`: two, since one of them may still be read where the other is written."""
        self._exchange, size = exchange, exchange.size

        def place(matrix: Tensor, unit: int = UNIT) -> Place:
            parts = [Shard(rank, size).of(matrix.shape[1], unit) for rank in range(size)]
            return exchange.place(matrix, parts)

        self._x, self._gated, self._logits = place(x), place(gated), place(logits)
        self._attended = place(attended, attended.shape[1] // size)
        self._scored = [place(each) for each in scored]

    @property
    def missing(self) -> int | None:
        return self._exchange.who_is_missing()

    def sorts(self, rows: int) -> bool:
        """Whether `all_attended` brings so many rows into an order."""
        return self._exchange.takes_index(self._attended, rows)

    def all_attended(self, part: Tensor, order: Tensor | None) -> Tensor:
        return self._exchange.all_gather(self._attended, part, order)

    def own_part(self, x: Tensor) -> Tensor:
        """This rank's columns of the stream."""
        return self._part(self._x, len(x))

    def all_of_stream(self, rows: int, norm: Tensor, eps: float, normed: Tensor, order: Tensor | None = None) -> Tensor:
        """What the ranks have added to their columns of the stream goes to all of them, and the rows are normalized."""
        return self._exchange.all_gather_norm(self._x, rows, norm, eps, normed, order)

    def own_gated(self, rows: int) -> Tensor:
        return self._part(self._gated, rows)

    def all_gated(self, part: Tensor) -> Tensor:
        return self._exchange.all_gather(self._gated, part)

    def logits(self, head: Callable[[Tensor, Tensor], Tensor], normed: Tensor) -> Tensor:
        """float32 [S, V] for a step to sample from. `head`: of [M, H], into this rank's columns."""
        return self._exchange.all_gather(self._logits, head(normed, self._part(self._logits, len(normed))))

    def scores(self, head: Callable[[Tensor, Tensor], Tensor], normed: Tensor, out: Tensor) -> Tensor:
        """The same of any number of rows, into `out`."""
        for begin in range(0, len(normed), SCORED_ROWS):
            rows, here = normed[begin : begin + SCORED_ROWS], self._scored[0]
            self._scored.reverse()
            found = self._exchange.all_gather(here, head(rows, self._part(here, len(rows))))
            out[begin : begin + len(rows)] = found
        return out

    def _part(self, place: Place, rows: int) -> Tensor:
        columns = place.columns[self._exchange.rank]
        return place.own[:rows, columns.start : columns.stop]


class CudaLlama:
    """A Llama on the device with buffers for steps of up to `max_rows` tokens and `max_sequences` sequences."""

    ahead = 0

    def __init__(
        self,
        model: LlamaWeights,
        max_rows: int,
        max_sequences: int,
        max_model_len: int,
        dtype: torch.dtype,
        batch_invariant: bool = False,
        features: Features | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """`batch_invariant`: a row has the same bits in every step, unless `of_cublas` names something. Rows of prompts
        and rows of answers each have kernels of their own then, and are in different steps. `features`: to be written
        for every token. `exchange`: where `model` is one rank's shard."""
        self.config, self.num_bytes, self.dtype = model.config, model.num_bytes, dtype
        self.batch_invariant, self._of_cublas = batch_invariant, of_cublas(model)
        self._embedding, self._lm_head, c = model.embedding, model.lm_head, model.config
        self._layers = [_Layer.of(layer, dtype) for layer in model.layers]
        self._prompt_layers = [layer.for_prompts() for layer in self._layers] if batch_invariant else []
        self._norm = in_type(model.norm, dtype)
        self._cos_sin = model.rotary.cos_sin(max_model_len)
        windows = (layer.window for layer in self._layers)
        self.row_groups = RowGroups.for_heads(c.num_attention_heads, c.num_key_value_heads, windows)
        self._num_heads, self._eps, self._scale = c.num_attention_heads, c.rms_norm_eps, c.head_dim**-0.5
        self.device = device = model.embedding.device
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def buffer(rows: int, columns: int, kind: torch.dtype = dtype) -> Tensor:
            # Zeros: rows of padding are computed with, and what memory holds by chance may be NaN.
            return torch.zeros(rows, columns, dtype=kind, device=device)

        self._x, self._normed = buffer(max_rows, c.hidden_size), buffer(max_rows, c.hidden_size)
        self._qkv, self._attended = buffer(max_rows, heads + 2 * kv), buffer(max_rows, heads)
        self._gated = buffer(max_rows, c.intermediate_size)
        self._last = buffer(max_sequences, c.hidden_size)
        self._logits = buffer(max_sequences, c.vocab_size, torch.float32)
        self._ranks = None
        if exchange is not None:
            attended = buffer(max_rows, heads * exchange.size)
            scored = [buffer(SCORED_ROWS, c.vocab_size, torch.float32) for _ in range(2)]
            self._ranks = _Ranks(exchange, self._x, attended, self._gated, self._logits, scored)
        self._workspace = decode_attention_workspace(c.num_attention_heads, c.num_key_value_heads, c.head_dim, device)
        self._features, self._taps = features, dict[int, Tensor]()
        if features is not None:
            self._tapped = buffer(max_rows, len(features.taps) * c.hidden_size)
            self._fused = buffer(max_rows, features.width)
            self._places = buffer(max_rows, 1, torch.int64).flatten()
            for i, layer in enumerate(features.taps):
                self._taps[layer] = self._tapped[:, i * c.hidden_size : (i + 1) * c.hidden_size]

    @property
    def has_ranks(self) -> bool:
        """Whether this is one of several."""
        return self._ranks is not None

    @property
    def missing_rank(self) -> int | None:
        """That this one, of several, has waited for in vain."""
        return None if self._ranks is None else self._ranks.missing

    @property
    def max_draft_rows(self) -> int:
        """Up to how many rows each has the bits it has alone."""
        return 0 if self._of_cublas else MAX_DRAFT_ROWS

    def forward(
        self,
        inputs: StepInputs[Tensor],
        history: Tensor,
        cache: list[Tensor],
        decode: bool,
        every_row: bool = False,
        drafted: bool = False,
        prompts: bool = False,
    ) -> Tensor:
        """K and V of the step's rows are in `cache` afterwards. Returns float32 logits [S, V] of `last_rows`, in a
        buffer that the next step overwrites; with `every_row` those of all rows, [T, V], in memory of their own.

        `decode`: every sequence has one row, in the order of the rows. `drafted`, with `decode`: several of these
        sequences may be rows of one. `prompts`, where batch_invariant: all rows are of prompts, and each sequence has
        tiles; otherwise none is.
        """
        rows = inputs.positions.shape[0]
        where = Context.of(inputs, self.batch_invariant and not decode and not prompts, drafted)
        x, normed = self._x[:rows], self._normed[:rows]
        ops.embed(history, inputs.row_seat, inputs.positions, self._embedding, x)
        few = decode and rows <= SCATTER_MAX_ROWS
        for i, (layer, kv) in enumerate(zip(self._prompt_layers if prompts else self._layers, cache, strict=True)):
            if self._ranks is None or i == 0:
                ops.rms_norm(x, layer.input_norm, self._eps, normed, layer.input_order)
            else:
                self._ranks.all_of_stream(rows, layer.input_norm, self._eps, normed, layer.input_order)
            if i in self._taps:  # behind the norm, which brings what other ranks have added to the stream
                self._taps[i][:rows].copy_(x)
            qkv = layer.qkv.forward(normed, self._qkv[:rows])
            index = layer.o_index if few else None
            if self._ranks is None:
                attended = self._attend(qkv, layer, kv, inputs, where, index, decode=decode, prompts=prompts)
                (layer.o_sorted if few else layer.o).forward(attended, x, residual=x)
                ops.rms_norm(x, layer.post_attention_norm, self._eps, normed, layer.gate_up_order)
                gated = layer.gate_up.forward(normed, self._gated[:rows], silu_mul=True)
                layer.down.forward(gated, x, residual=x)
            else:
                attended = self._attend(qkv, layer, kv, inputs, where, None, decode=decode, prompts=prompts)
                self._behind_attention(self._ranks, layer, attended, x, normed)
        if self._ranks is not None:
            self._ranks.all_of_stream(rows, self._norm, self._eps, normed)
        if self._features is not None:
            self._put_features(self._features, x, inputs.slot_mapping)
        if self._ranks is not None:
            if every_row:
                return self._any_logits(normed)
            if not decode:
                normed = torch.index_select(normed, 0, inputs.last_rows, out=self._last[: len(inputs.last_rows)])
            return self._ranks.logits(self._head, normed)
        if every_row:
            ops.rms_norm(x, self._norm, self._eps, normed)
            return self._any_logits(normed)
        if not decode:
            x = torch.index_select(x, 0, inputs.last_rows, out=self._last[: len(inputs.last_rows)])
        num = len(inputs.last_rows)
        return self._head(ops.rms_norm(x, self._norm, self._eps, self._normed[:num]), self._logits[:num])

    def _behind_attention(self, ranks: _Ranks, layer: _Layer, attended: Tensor, x: Tensor, normed: Tensor) -> None:
        """The rest of a layer, of which each rank has a part. `attended` [T, the rank's heads * D]; of x, which is all
        of the stream, this rank's part is updated in place, and the norm that follows brings the others'."""
        sorts = layer.o_index is not None and ranks.sorts(len(x))
        heads = ranks.all_attended(attended, layer.o_index if sorts else None)
        part = ranks.own_part(x)
        (layer.o_sorted if sorts else layer.o).forward(heads, part, residual=part)
        ranks.all_of_stream(len(x), layer.post_attention_norm, self._eps, normed, layer.gate_up_order)
        gated = ranks.all_gated(layer.gate_up.forward(normed, ranks.own_gated(len(x)), silu_mul=True))
        layer.down.forward(gated, part, residual=part)

    def _put_features(self, features: Features, x: Tensor, slots: Tensor) -> None:
        rows = len(x)
        if len(self._layers) in self._taps:
            self._taps[len(self._layers)][:rows].copy_(x)
        places = torch.add(slots, 1, out=self._places[:rows])
        features.put(self._tapped[:rows], places, self._fused[:rows])

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [N, V] of any rows (int64 [N] on the device) of the last forward pass, in memory of their own."""
        x = torch.index_select(self._x, 0, rows)
        return self._any_logits(ops.rms_norm(x, self._norm, self._eps, torch.empty_like(x)))

    def _any_logits(self, normed: Tensor) -> Tensor:
        """In memory of their own."""
        out = torch.empty(len(normed), self._logits.shape[1], device=normed.device)
        return self._head(normed, out) if self._ranks is None else self._ranks.scores(self._head, normed, out)

    def _attend(
        self,
        qkv: Tensor,
        layer: _Layer,
        kv: Tensor,
        inputs: StepInputs[Tensor],
        context: Context,
        out_index: Tensor | None,
        *,
        decode: bool,
        prompts: bool,
    ) -> Tensor:
        """`prompts`: one kernel attends for all rows. `decode`: the attention writes keys and values itself."""
        out = self._attended[: len(qkv)]
        where = (context.block_tables, context.lengths, context.query_start)
        rotary = None
        norms = (layer.q_norm, layer.k_norm, self._eps)
        if decode:
            rotary = RotaryInputs(inputs.positions, inputs.slot_mapping, self._cos_sin, *norms)
        else:
            ops.rope_and_write(qkv, inputs.positions, inputs.slot_mapping, self._cos_sin, kv, self._num_heads, *norms)
        window = layer.window
        shared = (self._num_heads, self._scale)
        # What a pure decode step reads of the cache was there before its first kernel.
        if not prompts:
            decode_attention(
                *(qkv, kv, *where, out, *shared, self._workspace, window, rotary, out_index),
                groups=context.groups,
                prefetch=decode,
            )
        if context.tiles is not None:
            prefill_attention(qkv, kv, *where, context.tiles, out, *shared, window)
        return out

    def _head(self, x: Tensor, out: Tensor) -> Tensor:
        head = self._lm_head
        if isinstance(head, CudaDenseLinear):
            # Logits are never rounded to 16 bits: the greedy token would be decided by it.
            return head_product(x, head.weight, out)
        return head.logits(x, out) if isinstance(head, PackedHead) else out.copy_(head.forward(x))
