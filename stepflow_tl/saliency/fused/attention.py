"""Attention whose backward pass pools `|A * dL/dA|` into step bins and never holds a `T x T` tensor.

Notation: A = softmax(scores) is the pattern, z = A v, `dX` is dL/dX. Per head and KV group:

1. Forward: z and the row-wise logsumexp of the scores. SDPA's flash kernel where it serves, else tile
   by tile.
2. Backward, tile by tile: `A = exp(scores - logsumexp)` again, and `dA = dz v^T`. Their product is the
   token saliency `|A * dA|` (or another of `saliency.scores`), which is pooled on the spot and forgotten.
3. The same product gives the scores' gradient: `ds = A * (dA - delta)`, with `delta[t] = sum_k A[t,k]
   dA[t,k] = <dz[t], z[t]>` known beforehand. Soft-capped scores `u = cap tanh(s / cap)` multiply it by `1 -
   (u / cap)^2`.
4. `dq = scale ds k`, `dk = scale ds^T q`, `dv = A^T dz`.
5. `diagonal_only` (objective "per_token", docs/method.md section 3) keeps what stays at one position: `dk_t =
   scale ds_tt q_t`, `dv_t = A_tt dz_t`, both O(T). It saves two of five matrix products.

Under StepFlow's bridge z is what `stepflow.bridged_attention` makes of it, and `bridged` says what changes
in steps 2 to 5: a factor f on A, and E in the place of delta.

An attention sink (gpt-oss) is one more logit in the softmax without a value: it enters the logsumexp, so
A's rows sum to less than one, and steps 2 to 5 hold unchanged; its own gradient is `-sum_t A[t, sink]
delta[t]`.

On a CPU the tiles of `sweep` do all of this. On an NVIDIA GPU:

* Forward: PyTorch's flash kernel, where it serves; it returns the logsumexp of each row as well.
* Backward, ordinary objectives: PyTorch's flash backward gives dq, dk and dv from that logsumexp, and
  `pool_on_device` the map. A sink is in the logsumexp and in z already, and the flash backward uses nothing
  else of the softmax. It adds up dq in no fixed order unless PyTorch is told otherwise, so it is told.
* Backward, `diagonal_only`: `pool_on_device` gives the map and dq in one sweep of three matrix products; dk
  and dv are the diagonal's. The flash backward would spend five products to throw two gradients away.
* What is not served so (float64, scores other than "saliency", ordinary objectives under a window, a soft-cap
  or the bridge, no Triton) goes through the tiles, on any device.

Memory beyond the inputs: q, k, v, z and one number per row saved; two or three tile buffers while backward
runs, or what the two kernels need on a GPU (`triton_pooling.LINE_BYTES`, and flash attention's float32 copy
of dq, a few times over in its deterministic mode). Time: 2 matrix products forward, 3 (`diagonal_only`) or 5
backward, over the visible part of the square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.models.attention import Call, Visible, by_kernel, flash_takes
from stepflow_tl.saliency.fused.bridged import OTHER, BridgedTerms, Bridging
from stepflow_tl.saliency.fused.call import AttentionSpec, BackwardCall, accumulation_dtype
from stepflow_tl.saliency.fused.steps import StepSums
from stepflow_tl.saliency.fused.sweep import tiled_backward, tiled_forward
from stepflow_tl.saliency.fused.triton_pooling import available, pool_on_device
from stepflow_tl.stepflow.bridged_attention import BridgedRows, bridged_attention


def saliency_attention(
    query: Float[Tensor, "batch head token d_head"],
    key: Float[Tensor, "batch kv_head token d_head"],
    value: Float[Tensor, "batch kv_head token d_value"],
    spec: AttentionSpec,
    *,
    sums: StepSums | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    anchor: Float[Tensor, ""] | None = None,
    bridging: Bridging | None = None,
) -> Float[Tensor, "batch head token d_value"]:
    """Causal attention that adds its token saliency to `sums` when a gradient comes back.

    Args:
        query: Queries; consecutive heads share a KV head.
        key: Keys.
        value: Values.
        spec: Scale, mask, soft-cap and what backward does.
        sums: Where the pooled saliency goes; None to pool nothing.
        sinks: One logit per head that joins the softmax without a value.
        anchor: A scalar that requires a gradient, so that backward runs even where q, k and v require none.
            It is given a zero gradient.
        bridging: StepFlow's bridge, if it acts on this call.
    """
    arguments = (query, key, value, sinks, anchor, spec, sums, bridging)
    return _SaliencyAttention.apply(*arguments)  # pyright: ignore[reportReturnType]


class _SaliencyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        anchor: Tensor | None,
        spec: AttentionSpec,
        sums: StepSums | None,
        bridging: Bridging | None,
    ) -> Tensor:
        z, logsumexp = _forward(query, key, value, sinks, spec)
        output, kept = z, None
        if bridging is not None:
            visible = Visible(query.shape[2], key.shape[2], window=spec.window)
            call = Call(query, key, value, z, logsumexp, visible, spec.scale, spec.softcap, sinks)
            kept = BridgedRows.nothing(bridging.spans, call)
            output = bridged_attention(call, bridging.spans, bridging.bridge, kept=kept)
            kept = None if output is z else kept
        kept_tensors = () if kept is None else kept.tensors()
        ctx.save_for_backward(query, key, value, sinks, z, logsumexp, *kept_tensors)
        ctx.spec, ctx.sums, ctx.bridging = spec, sums, bridging
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dz,) = grad_outputs
        query, key, value, sinks, z, logsumexp, *kept = ctx.saved_tensors
        needs_query, needs_key, needs_value, needs_sinks, needs_anchor, *_ = ctx.needs_input_grad
        work = accumulation_dtype(query.dtype)
        delta = (dz.to(work) * z.to(work)).sum(-1)
        bridged = None
        if kept:
            rows = BridgedRows(ctx.bridging.spans, *kept)
            bridged = BridgedTerms.of(rows, dz, delta, ctx.bridging)
        sink_mass = None if sinks is None else torch.exp(sinks.to(work)[:, None] - logsumexp)
        call = BackwardCall(query, key, value, logsumexp, dz, delta, ctx.spec, bridged, sink_mass)
        pooled_by_kernel = ctx.sums is None or ctx.sums.score == "saliency"  # the only score that they pool
        pooling = ctx.sums is not None
        if pooled_by_kernel and kernels_serve(query, key, value, ctx.spec, pooling=pooling, bridged=bridged):
            dq, dk, dv = kernel_backward(call, z, ctx.sums)
        else:
            diagonal = ctx.spec.diagonal_only
            needed = (needs_query, needs_key and not diagonal, needs_value and not diagonal)
            dq, dk, dv = tiled_backward(call, ctx.sums, needed)
            if diagonal and (needs_key or needs_value):
                dk, dv = diagonal_gradients(call)
        dsinks = None
        if needs_sinks and sink_mass is not None:
            offset = delta if bridged is None else bridged.offsets[..., OTHER]
            dsinks = -(sink_mass * offset).sum((0, 2)).to(sinks.dtype)
        danchor = dz.new_zeros(()) if needs_anchor else None
        return dq, dk, dv, dsinks, danchor, None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Return z and the logsumexp of each row's scores, sink included."""
    served = None
    if _is_plain(query, spec):
        served = by_kernel(query, key, value, scale=spec.scale, is_causal=True)
    z, logsumexp = tiled_forward(query, key, value, spec) if served is None else served
    if sinks is not None:
        with_sink = torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype)[:, None])
        z = z * torch.exp(logsumexp - with_sink)[..., None].to(z.dtype)
        logsumexp = with_sink
    return z, logsumexp


def flash_serves(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """Whether PyTorch's flash kernels compute this call, forward and backward."""
    return _is_plain(query, spec) and flash_takes(query, key, value, is_causal=True)


def _is_plain(query: Tensor, spec: AttentionSpec) -> bool:
    return spec.window_within(query.shape[2]) is None and spec.softcap is None


def kernels_serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    *,
    pooling: bool,
    bridged: BridgedTerms | None = None,
) -> bool:
    """Whether `kernel_backward` computes this call, its pooled map included if there is `pooling`."""
    kernel = query.is_cuda and available(query.device, query.dtype)
    if spec.diagonal_only:
        return kernel
    # The flash backward knows nothing of the bridge.
    return bridged is None and (kernel or not pooling) and flash_serves(query, key, value, spec)


def kernel_backward(
    call: BackwardCall, z: Float[Tensor, "batch head token d_value"], sums: StepSums | None
) -> tuple[
    Float[Tensor, "batch head token d_head"],
    Float[Tensor, "batch kv_head token d_head"],
    Float[Tensor, "batch kv_head token d_value"],
]:
    """Add the token saliency to `sums`, if given, and return dq, dk and dv, all by GPU kernels.

    `call` is one that `kernels_serve` has accepted, `z` what its forward pass returned, sink included.
    """
    spec, n_tokens = call.spec, call.n_tokens
    # Where nothing is pooled, every token counts as TEMPLATE, which takes next to no memory.
    step_ids, n_steps = torch.full((n_tokens,), -1), 0
    if sums is not None:
        step_ids, n_steps = sums.tiles.step_ids, sums.tiles.n_steps
    dqs: list[Any] = []
    for batch in range(call.query.shape[0] if sums is not None or spec.diagonal_only else 0):
        found, dq = pool_on_device(call.sequence(batch), step_ids, n_steps, with_dq=spec.diagonal_only)
        dqs.append(dq)
        if sums is not None:
            sums.add(slice(None), sums.steps, found)
    if spec.diagonal_only:
        return torch.stack(dqs), *diagonal_gradients(call)
    # The state of the dropout's random numbers, which nothing reads without dropout.
    state = torch.zeros(2, dtype=torch.uint64, device=z.device)
    tensors = (call.dz, call.query, call.key, call.value, z, call.logsumexp)
    lengths = (None, None, n_tokens, n_tokens)
    with _deterministic():
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *tensors, *lengths, 0.0, True, state, state[:0], scale=spec.scale
        )


def diagonal_gradients(
    call: BackwardCall,
) -> tuple[Float[Tensor, "batch kv_head token d_head"], Float[Tensor, "batch kv_head token d_value"]]:
    """Each token's dk and dv through its own query alone: `dk_t = scale ds_tt q_t`, `dv_t = A_tt dz_t`."""
    spec = call.spec
    factor, offset = (None, call.delta) if call.bridged is None else call.bridged.diagonal()
    dk, dv = torch.empty_like(call.key), torch.empty_like(call.value)
    work = accumulation_dtype(call.query.dtype)
    groups = call.heads_per_group
    for kv_head in range(call.key.shape[1]):  # one KV head at a time: the float32 copies stay small
        heads = slice(kv_head * groups, (kv_head + 1) * groups)
        q, own_dz = call.query[:, heads].to(work), call.dz[:, heads].to(work)
        scores = torch.einsum("bhtd,btd->bht", q, call.key[:, kv_head].to(work)) * spec.scale
        slope = 1.0
        if spec.softcap is not None:
            bounded = torch.tanh(scores / spec.softcap)
            scores, slope = bounded * spec.softcap, 1 - bounded.square()
        pattern = torch.exp(scores - call.logsumexp[:, heads])
        dpattern = torch.einsum("bhtd,btd->bht", own_dz, call.value[:, kv_head].to(work))
        bridged = pattern if factor is None else pattern * factor[:, heads]
        dscores = (bridged * dpattern - pattern * offset[:, heads]) * slope
        dk[:, kv_head] = torch.einsum("bht,bhtd->btd", dscores * spec.scale, q).to(dk.dtype)
        dv[:, kv_head] = torch.einsum("bht,bhtd->btd", bridged, own_dz).to(dv.dtype)
    return dk, dv


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
