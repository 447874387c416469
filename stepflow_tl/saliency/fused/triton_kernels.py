"""Triton kernels that pool `|A * dL/dA|` by runs of tokens, and give dq on the way.

Notation as in `attention`; runs and pairs as in `steps`.

`pool_block`: one program owns one head and one block of query rows.

1. Walk the key tiles of the block's rows from left to right, from the window's edge to the diagonal.
   `A = exp2(scores - logsumexp)` and `dA = dz v^T` are made again; `saliency = |A * dA|` stays on chip.
2. A tile's columns meet the runs `current .. last`, one after the other because runs tile the sequence. For
   each, add the tile's columns of that run to one number per row. A run that ends in this tile is closed:
   its row numbers are summed per query run and stored, once, to the pair's own line. The last run stays open
   and goes on into the next tile.
3. If dq is wanted: `ds = A * (dA - delta)`, `dq += ds k`.
4. Under the bridge (`bridged`): `saliency = |f A * dA|` and `ds = f A * dA - A * E`, with f and E those of
   the key's group; a byte per span of queries and key says which one that is.

`fold_pairs`: one program owns one head, one query step and a stretch of key runs, and adds the lines of the
step's pairs, top to bottom.

No atomics: every number is written once, by one program, and summed in a fixed order, so equal inputs give
equal bits. Products take the inputs' type with float32 accumulation ("ieee" for float32 inputs, never TF32);
all else is float32. Nothing here needs more than an Ampere GPU.

This module needs Triton; `triton_pooling` imports it when a kernel is launched.
"""

from typing import no_type_check

import triton
import triton.language as tl

# `no_type_check`: Triton reads a kernel's source and globals, so nothing may be wrapped around it.


@triton.jit
@no_type_check
def _product(left, right, UPCAST: tl.constexpr):
    """`left @ right` in float32. Triton's interpreter multiplies bfloat16 bit patterns, hence `UPCAST`."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
@no_type_check
def _close_run(row_sums, in_query_run, line_ptrs, is_line, run):
    """Store what the block's rows hold for the key run `run`, summed per query run."""
    sums = tl.sum(tl.where(in_query_run, row_sums[:, None], 0.0), axis=0)
    tl.store(line_ptrs + run, sums, mask=is_line)


@triton.jit
@no_type_check
def pool_block(
    query_ptr,
    key_ptr,
    value_ptr,
    dz_ptr,
    logsumexp_ptr,  # [head, token], contiguous, natural logarithm
    delta_ptr,  # [head, token], contiguous; read if DQ
    dq_ptr,  # [head, token, d_head], contiguous; written if DQ
    pairs_ptr,  # [head, pair, run], contiguous, zeros
    run_of_ptr,  # [token]
    first_pair_ptr,  # [block + 1]
    factor_ptr,  # [head, token, 3], contiguous: f for O, S and B; read if BRIDGED
    offset_ptr,  # [head, token, 3], contiguous: E for O, S and B; read if BRIDGED
    group_ptr,  # [line, token], contiguous: 0, 1, 2 for O, S, B; read if BRIDGED
    line_of_ptr,  # [token]: line of each query; read if BRIDGED
    query_head_stride,
    query_token_stride,
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    dz_head_stride,
    dz_token_stride,
    n_tokens,
    n_runs,
    n_pairs,
    scale,
    softcap,
    window,
    GROUPS: tl.constexpr,
    D_HEAD: tl.constexpr,
    D_VALUE: tl.constexpr,
    BLOCK_D_HEAD: tl.constexpr,
    BLOCK_D_VALUE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    RUNS_PER_BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DQ: tl.constexpr,
    BRIDGED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Pool one head's block of query rows, and write its dq."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    # Late blocks see the most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // GROUPS

    start = block * BLOCK_QUERIES
    rows = start + tl.arange(0, BLOCK_QUERIES)
    d_head = tl.arange(0, BLOCK_D_HEAD)
    d_value = tl.arange(0, BLOCK_D_VALUE)
    is_row = rows < n_tokens
    is_query = is_row[:, None] & (d_head < D_HEAD)[None, :]
    is_dz = is_row[:, None] & (d_value < D_VALUE)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    q = tl.load(
        query_ptr + head * query_head_stride + long_rows * query_token_stride + d_head[None, :],
        mask=is_query,
        other=0.0,
    )
    dz = tl.load(
        dz_ptr + head * dz_head_stride + long_rows * dz_token_stride + d_value[None, :],
        mask=is_dz,
        other=0.0,
    )
    row_logsumexp = tl.load(logsumexp_ptr + head * n_tokens + rows, mask=is_row, other=0.0) * LOG2_E
    if DQ:
        row_delta = tl.load(delta_ptr + head * n_tokens + rows, mask=is_row, other=0.0)
        dq = tl.zeros([BLOCK_QUERIES, BLOCK_D_HEAD], dtype=tl.float32)

    if BRIDGED:
        terms = (head * n_tokens + rows) * 3
        own_factor = tl.load(factor_ptr + terms + 1, mask=is_row, other=0.0)
        bridge_factor = tl.load(factor_ptr + terms + 2, mask=is_row, other=0.0)
        other_offset = tl.load(offset_ptr + terms, mask=is_row, other=0.0)
        own_offset = tl.load(offset_ptr + terms + 1, mask=is_row, other=0.0)
        bridge_offset = tl.load(offset_ptr + terms + 2, mask=is_row, other=0.0)
        line_ptr = group_ptr + tl.load(line_of_ptr + rows, mask=is_row, other=0).to(tl.int64) * n_tokens

    end = tl.minimum(start + BLOCK_QUERIES, n_tokens)
    first = start * 0
    if HAS_WINDOW:
        first = tl.maximum(start - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS

    first_pair = tl.load(first_pair_ptr + block)
    lines = tl.arange(0, RUNS_PER_BLOCK)
    is_line = lines < tl.load(first_pair_ptr + block + 1) - first_pair
    line_ptrs = pairs_ptr + (head * n_pairs + first_pair + lines) * n_runs
    query_runs = tl.load(run_of_ptr + rows, mask=is_row, other=-1) - tl.load(run_of_ptr + start)
    in_query_run = query_runs[:, None] == lines[None, :]
    current = tl.load(run_of_ptr + first)
    row_sums = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)

    for key_start in range(first, end, BLOCK_KEYS):
        columns = key_start + tl.arange(0, BLOCK_KEYS)
        is_column = columns < end
        long_columns = columns.to(tl.int64)[:, None]
        k = tl.load(
            key_ptr + kv_head * key_head_stride + long_columns * key_token_stride + d_head[None, :],
            mask=is_column[:, None] & (d_head < D_HEAD)[None, :],
            other=0.0,
        )
        v = tl.load(
            value_ptr + kv_head * value_head_stride + long_columns * value_token_stride + d_value[None, :],
            mask=is_column[:, None] & (d_value < D_VALUE)[None, :],
            other=0.0,
        )
        scores = _product(q, tl.trans(k), UPCAST) * scale
        if HAS_SOFTCAP:
            # tanh, which Triton lacks, without overflow.
            decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))
            bounded = tl.where(scores < 0.0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
            scores = bounded * softcap
        distance = rows[:, None] - columns[None, :]
        visible = (distance >= 0) & is_row[:, None]
        if HAS_WINDOW:
            visible = visible & (distance < window)
        # Hidden before exp2: a hidden score may lie far above the row's logsumexp and overflow.
        pattern = tl.exp2(tl.where(visible, scores * LOG2_E - row_logsumexp[:, None], float("-inf")))
        dpattern = _product(dz, tl.trans(v), UPCAST)
        if BRIDGED:
            is_pair = is_row[:, None] & is_column[None, :]
            groups = tl.load(line_ptr[:, None] + columns[None, :], mask=is_pair, other=0)
            is_own, is_bridge = groups == 1, groups == 2
            factor = tl.where(is_own, own_factor[:, None], tl.where(is_bridge, bridge_factor[:, None], 1.0))
            bridged = pattern * factor
        else:
            bridged = pattern
        saliency = tl.abs(bridged * dpattern)
        column_runs = tl.load(run_of_ptr + columns, mask=is_column, other=-1)
        last = tl.load(run_of_ptr + tl.minimum(key_start + BLOCK_KEYS, end) - 1)
        for run in range(current, last):
            row_sums += tl.sum(tl.where(column_runs[None, :] == run, saliency, 0.0), axis=1)
            _close_run(row_sums, in_query_run, line_ptrs, is_line, run)
            row_sums = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
        row_sums += tl.sum(tl.where(column_runs[None, :] == last, saliency, 0.0), axis=1)
        current = last
        if DQ:
            if BRIDGED:
                offset = tl.where(is_bridge, bridge_offset[:, None], other_offset[:, None])
                offset = tl.where(is_own, own_offset[:, None], offset)
                dscores = bridged * dpattern - pattern * offset
            else:
                dscores = pattern * (dpattern - row_delta[:, None])
            if HAS_SOFTCAP:
                dscores = dscores * (1.0 - bounded * bounded)
            dq += _product(dscores.to(k.dtype), k, UPCAST)

    _close_run(row_sums, in_query_run, line_ptrs, is_line, current)
    if DQ:
        dq_ptrs = dq_ptr + (head * n_tokens + long_rows) * D_HEAD + d_head[None, :]
        tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=is_query)


@triton.jit
@no_type_check
def fold_pairs(
    pairs_ptr,  # [head, pair, run], contiguous
    folded_ptr,  # [head, step, run], contiguous
    step_pairs_ptr,  # [step, 2], half-open range of the step's pairs
    n_steps,
    n_runs,
    n_pairs,
    BLOCK_RUNS: tl.constexpr,
):
    """Add the lines of one query step's pairs."""
    step = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    runs = tl.program_id(2) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    is_run = runs < n_runs
    sums = tl.zeros([BLOCK_RUNS], dtype=tl.float32)
    first, last = tl.load(step_pairs_ptr + 2 * step), tl.load(step_pairs_ptr + 2 * step + 1)
    for pair in range(first, last):
        sums += tl.load(pairs_ptr + (head * n_pairs + pair) * n_runs + runs, mask=is_run, other=0.0)
    tl.store(folded_ptr + (head * n_steps + step) * n_runs + runs, sums, mask=is_run)
