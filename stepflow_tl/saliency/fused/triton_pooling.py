"""Pool `|A * dL/dA|` into step bins on a GPU, with dq if wanted: the launcher of `triton_kernels`.

1. Cut the tokens into runs of one bin, and list the pairs of a query block and a run that it meets
   (`StepRuns`).
2. Launch `pool_block` over (query block, head), which fills one line of key runs per pair.
3. Launch `fold_pairs`, which adds the lines of each query step. TEMPLATE queries are dropped.
4. Put each step's key run into its column and the sum of all TEMPLATE runs into the last one.

Memory: the lines of a few heads at a time, `pairs * runs` float32 numbers per head, at most `line_bytes`
unless one KV group alone takes more. Time: two matrix products over the visible part of the square, three
with dq.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.saliency.fused.call import BackwardCall
from stepflow_tl.saliency.fused.steps import StepRuns

LINE_BYTES = 64 << 20
# The q, dz, k and v tiles of one program together: fits the shared memory of every Ampere GPU.
_TILE_BYTES = 64 << 10
_RUNS_PER_FOLD = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `pool_on_device` runs here: Triton, an Ampere or later NVIDIA GPU, and no float64.

    With Triton's interpreter on (`TRITON_INTERPRET=1` before Triton is imported) it runs on a CPU as well.
    """
    if dtype not in _DTYPES or not _has_triton():
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def pool_on_device(
    call: BackwardCall,
    step_ids: Int[Tensor, " token"],
    n_steps: int,
    *,
    with_dq: bool = False,
    line_bytes: int = LINE_BYTES,
) -> tuple[Float[Tensor, "head query_step key_bin"], Float[Tensor, "head token d_head"] | None]:
    """Token saliency of one sequence, pooled into step bins, and dL/dq.

    Args:
        call: One sequence, float32, bfloat16 or float16; any strides. With the bridge's terms where it acts.
        step_ids: Step of each token, -1 on TEMPLATE; a step's tokens are consecutive.
        n_steps: Number of steps.
        with_dq: Whether dq is computed.
        line_bytes: What the lines of one launch may take, and so how many heads are launched together.

    Returns:
        The sums in float32, the last bin being TEMPLATE, and dq (None unless wanted).

    Raises:
        FusedRefusal: If it cannot run on this device or type, if the steps are not those of the call's
            tokens, or if a step's tokens are not consecutive.
    """
    _check(call, step_ids)
    n_heads = call.query.shape[0]
    groups = call.heads_per_group
    # Kernels take any strides but that of the last axis, and rows of numbers as they come.
    rows = {name: getattr(call, name).to(torch.float32).contiguous() for name in ("logsumexp", "delta")}
    matrices = {name: getattr(call, name) for name in ("query", "key", "value", "dz")}
    dense = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in matrices.items()}
    terms = None if call.bridged is None else call.bridged.in_float32()
    call = replace(call, **rows, **dense, bridged=terms)
    # Heads are padded to a power of two; matrix products need 16 at least.
    widths = [max(16, 1 << (x.shape[-1] - 1).bit_length()) for x in (call.query, call.value)]
    n_rows = _TILE_BYTES // (2 * sum(widths) * call.query.element_size())
    size = min(64, max(16, 1 << (n_rows.bit_length() - 1)))
    runs = StepRuns.of(step_ids, size).to(call.query.device)
    dq = torch.empty(call.query.shape, dtype=call.query.dtype, device=call.query.device) if with_dq else None
    sums = call.logsumexp.new_zeros(n_heads, n_steps, n_steps + 1)
    chunk = max(1, line_bytes // (4 * runs.n_pairs * runs.n_runs * groups)) * groups
    for first in range(0, n_heads, chunk):
        heads = slice(first, min(first + chunk, n_heads))
        part = call.kv_heads(heads.start // groups, heads.stop // groups)
        lines = call.logsumexp.new_zeros(heads.stop - first, runs.n_pairs, runs.n_runs)
        _launch(size, widths, part, None if dq is None else dq[heads], runs, lines)
        runs.add_into(sums[heads], _fold(lines, runs))
    return sums, dq


def _launch(
    size: int, widths: list[int], call: BackwardCall, dq: Tensor | None, runs: StepRuns, lines: Tensor
) -> None:
    """Tiles of `size` queries by `size` keys; `widths` are the padded heads of queries and of values."""
    from stepflow_tl.saliency.fused import triton_kernels

    kernel: Any = triton_kernels.pool_block  # launch options are no parameters of the function
    n_heads, n_tokens, d_head = call.query.shape
    window, softcap = call.spec.window_within(n_tokens), call.spec.softcap
    grid = (-(-n_tokens // size), n_heads)
    tensors = (call.query, call.key, call.value, call.dz)
    bridged = [call.logsumexp] * 4  # any pointers: `BRIDGED` keeps the kernel from following them
    if call.bridged is not None:
        groups = call.bridged.groups[0].on(call.query.device)
        bridged = [call.bridged.factors, call.bridged.offsets, *groups]
    with _on_device(call.query.device):
        kernel[grid](
            *tensors,
            call.logsumexp,
            call.delta,
            call.logsumexp if dq is None else dq,  # any pointer: `DQ` keeps the kernel from following it
            lines,
            runs.run_of,
            runs.first_pair,
            *bridged,
            *(x.stride(axis) for x in tensors for axis in (0, 1)),
            n_tokens,
            runs.n_runs,
            runs.n_pairs,
            float(call.spec.scale),
            float(softcap or 1.0),
            window or 0,
            GROUPS=call.heads_per_group,
            D_HEAD=d_head,
            D_VALUE=call.value.shape[-1],
            BLOCK_D_HEAD=widths[0],
            BLOCK_D_VALUE=widths[1],
            BLOCK_QUERIES=size,
            BLOCK_KEYS=size,
            RUNS_PER_BLOCK=max(2, 1 << (runs.runs_per_block - 1).bit_length()),
            HAS_SOFTCAP=softcap is not None,
            HAS_WINDOW=window is not None,
            DQ=dq is not None,
            BRIDGED=call.bridged is not None,
            UPCAST=call.query.device.type == "cpu",
            num_warps=8 if size > 16 else 4,
            num_stages=2,
            enable_fp_fusion=True,
        )


def _fold(lines: Tensor, runs: StepRuns) -> Tensor:
    from stepflow_tl.saliency.fused import triton_kernels

    kernel: Any = triton_kernels.fold_pairs
    folded = lines.new_empty(lines.shape[0], len(runs.steps), runs.n_runs)
    if folded.numel():
        grid = (len(runs.steps), lines.shape[0], -(-runs.n_runs // _RUNS_PER_FOLD))
        with _on_device(lines.device):
            kernel[grid](
                lines,
                folded,
                runs.step_pairs,
                len(runs.steps),
                runs.n_runs,
                runs.n_pairs,
                BLOCK_RUNS=_RUNS_PER_FOLD,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return folded


def _on_device(device: torch.device) -> Any:
    # Triton launches on the current device, which need not be the tensors' own under device_map.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(call: BackwardCall, step_ids: Tensor) -> None:
    if not available(call.query.device, call.query.dtype):
        raise FusedRefusal(
            f"the Triton kernel cannot run with {call.query.dtype} on {call.query.device}: it needs Triton, "
            "an Ampere or later NVIDIA GPU and float32, bfloat16 or float16 (on a CPU: TRITON_INTERPRET=1)"
        )
    if tuple(step_ids.shape) != (call.n_tokens,):
        raise FusedRefusal(
            f"`step_ids` has shape {tuple(step_ids.shape)}; {(call.n_tokens,)} goes with query "
            f"{tuple(call.query.shape)}"
        )
    for name in ("key", "value", "dz"):
        dtype = getattr(call, name).dtype
        if dtype != call.query.dtype:
            raise FusedRefusal(f"`{name}` is {dtype} and query {call.query.dtype}: they must agree")
