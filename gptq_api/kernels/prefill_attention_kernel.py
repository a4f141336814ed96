"""The Triton kernel behind `kernels.prefill_attention`: causal attention of a tile of query rows over a paged cache.

One program is one tile of rows of one sequence and one query head. Online softmax to base 2 in float32. Tiles of keys
start at multiples of TILE_KEYS wherever the tile of queries starts, so a row's sums are taken in the same order however
its prompt was cut into chunks and whoever else is in the batch: a tile masked for the whole row changes no bit of it.
"""

# Triton evaluates the annotations of a kernel, and knows only its own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _as(x, like):
    """Of the type of `like`. uint8: e4m3 for GPUs without its conversion. With exponent and mantissa where fp16 has
    them a number is 2^-8 of itself, a subnormal one too, and the product is exact; NaN becomes 480."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = moved.to(tl.float16, bitcast=True) * 256.0
    return x.to(like.dtype)


@triton.jit
def _over_keys(
    state,
    q,
    keys,
    values,
    table,
    start,
    stop,
    position,
    context,
    window,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The state (weighted sum of values, largest score, sum of weights) after keys start..stop. Without MASKED every
    row sees all of them. Slots past the context may hold anything, NaN too, and are not loaded. AHEAD: block numbers
    are read one tile early, which pays where a program has its multiprocessor to itself, and costs registers."""
    acc, largest, total = state
    d = tl.arange(0, PADDED_DIM)
    if AHEAD:
        n = start + tl.arange(0, TILE_KEYS)
        block = tl.load(table + n // BLOCK_SIZE, mask=n < context, other=0)
    for first in range(start, stop, TILE_KEYS):
        n = first + tl.arange(0, TILE_KEYS)
        if not AHEAD:
            if MASKED:
                block = tl.load(table + n // BLOCK_SIZE, mask=n < context, other=0)
            else:
                block = tl.load(table + n // BLOCK_SIZE)
        at = block.to(tl.int64) * BLOCK_STRIDE + (n % BLOCK_SIZE) * HEAD_DIM
        if AHEAD:
            block = tl.load(table + (n + TILE_KEYS) // BLOCK_SIZE, mask=n + TILE_KEYS < context, other=0)
        offsets = at[:, None] + d[None, :]
        if MASKED or HEAD_DIM != PADDED_DIM:
            inside = (n < context)[:, None] & (d < HEAD_DIM)[None, :]
            k = _as(tl.load(keys + offsets, mask=inside, other=0.0), q)
            v = _as(tl.load(values + offsets, mask=inside, other=0.0), q)
        else:
            k = _as(tl.load(keys + offsets), q)
            v = _as(tl.load(values + offsets), q)
        scores = tl.dot(q, k.T)
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (n[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1) * scale)
        reference = largest
        if WINDOW and MASKED:  # a row may not have seen any key yet
            reference = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores * scale - reference[:, None])
        correction = tl.exp2(before - reference)
        total = total * correction + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v, acc * correction[:, None])
    return acc, largest, total


@triton.jit(do_not_specialize=["table_stride", "window", "scale"])
def prefill_attention_kernel(
    qkv,
    cache,
    block_tables,
    context_lens,
    query_start,
    tiles,
    out,
    table_stride,
    window,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Shapes as in the wrapper; `scale` includes log2(e). A program serves ROWS rows of a tile of TILE_ROWS. OVERLAP:
    launched with programmatic dependent launch."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    # the last rows of a sequence see the most keys: they go first, so that short tiles fill the end
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    parts: tl.constexpr = TILE_ROWS // ROWS
    tile = part // parts
    sequence = tl.load(tiles + 2 * tile)
    if sequence < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1) + part % parts * ROWS
    query_first = tl.load(query_start + sequence)
    num_rows = tl.load(query_start + sequence + 1) - query_first
    if first_row >= num_rows:
        return
    context = tl.load(context_lens + sequence)
    row = first_row + tl.arange(0, ROWS)
    first_position = context - num_rows + first_row
    position = first_position + tl.arange(0, ROWS)
    stop = tl.minimum(first_position + ROWS, context)

    d = tl.arange(0, PADDED_DIM)
    real = (row < num_rows)[:, None] & (d < HEAD_DIM)[None, :]
    token = (query_first + row).to(tl.int64)
    width: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    q = tl.load(qkv + token[:, None] * width + head * HEAD_DIM + d[None, :], mask=real, other=0.0)

    keys = cache + (head // (NUM_HEADS // NUM_KV_HEADS)) * (BLOCK_SIZE * HEAD_DIM)
    values = keys + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    table = block_tables + sequence.to(tl.int64) * table_stride
    stride: tl.constexpr = 2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    state = (
        tl.zeros([ROWS, PADDED_DIM], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
    )
    start = 0
    whole = (first_position + 1) // TILE_KEYS * TILE_KEYS  # from here on some row does not see every key of a tile
    if WINDOW:
        start = tl.maximum(first_position - window + 1, 0) // TILE_KEYS * TILE_KEYS
        edge = tl.cdiv(tl.maximum(stop - window, 0), TILE_KEYS) * TILE_KEYS  # up to here some row has left keys behind
        edge = tl.minimum(tl.maximum(edge, start), tl.maximum(whole, start))
        whole = tl.maximum(whole, edge)
        state = _over_keys(
            *(state, q, keys, values, table, start, edge, position, context, window, scale),
            *(True, True, HEAD_DIM, PADDED_DIM, TILE_KEYS, BLOCK_SIZE, stride, ROWS != TILE_ROWS),
        )
        start = edge
    state = _over_keys(
        *(state, q, keys, values, table, start, whole, position, context, window, scale),
        *(False, WINDOW, HEAD_DIM, PADDED_DIM, TILE_KEYS, BLOCK_SIZE, stride, ROWS != TILE_ROWS),
    )
    state = _over_keys(
        *(state, q, keys, values, table, whole, stop, position, context, window, scale),
        *(True, WINDOW, HEAD_DIM, PADDED_DIM, TILE_KEYS, BLOCK_SIZE, stride, ROWS != TILE_ROWS),
    )
    acc, _, total = state
    result = (acc / total[:, None]).to(q.dtype)
    tl.store(out + token[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + d[None, :], result, mask=real)
