"""Attention whose backward pass pools `|A * dL/dA|` into step bins and never holds a `T x T` tensor.

Notation: A = softmax(scores) is the pattern, z = A v, `dX` is dL/dX. Per head and KV group:

1. Forward: z and the row-wise logsumexp of the scores. SDPA's flash kernel where it serves, else tile
   by tile.
2. Backward, tile by tile: `A = exp(scores - logsumexp)` again, and `dA = dz v^T`. Their product is the
   token saliency `|A * dA|`, which is pooled on the spot and forgotten.
3. The same product gives the scores' gradient: `ds = A * (dA - delta)`, with `delta[t] = sum_k A[t,k]
   dA[t,k] = <dz[t], z[t]>` known beforehand. Soft-capped scores `u = cap tanh(s / cap)` multiply it by `1 -
   (u / cap)^2`.
4. `dq = scale ds k`, `dk = scale ds^T q`, `dv = A^T dz`.
5. `diagonal_only` (objective "per_token", docs/method.md section 3) keeps what stays at one position: `dk_t =
   scale ds_tt q_t`, `dv_t = A_tt dz_t`, both O(T). It saves two of five matrix products.

An attention sink (gpt-oss) is one more logit in the softmax without a value: it enters the logsumexp, so
A's rows sum to less than one, and steps 2 to 5 hold unchanged; its own gradient is `-sum_t A[t, sink]
delta[t]`.

Memory beyond the inputs: q, k, v, z and one number per row saved; two or three tile buffers while backward
runs. Time: 2 matrix products forward, 3 (`diagonal_only`) or 5 backward, over the visible part of the
square.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.saliency.fused import device
from stepflow_tl.saliency.fused.spec import AttentionSpec
from stepflow_tl.saliency.fused.sweep import accumulation_dtype, tiled_backward, tiled_forward


def saliency_attention(
    query: Float[Tensor, "batch head token d_head"],
    key: Float[Tensor, "batch kv_head token d_head"],
    value: Float[Tensor, "batch kv_head token d_value"],
    spec: AttentionSpec,
    *,
    sinks: Float[Tensor, " head"] | None = None,
    anchor: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "batch head token d_value"]:
    """Causal attention that adds its token saliency to `spec.step_sums` when a gradient comes back.

    Args:
        query: Queries; consecutive heads share a KV head.
        key: Keys.
        value: Values.
        spec: Scale, mask, soft-cap and what backward does.
        sinks: One logit per head that joins the softmax without a value.
        anchor: A scalar that requires a gradient, so that backward runs even where q, k and v require none.
            It is given a zero gradient.
    """
    return _SaliencyAttention.apply(query, key, value, sinks, anchor, spec)  # pyright: ignore[reportReturnType]


class _SaliencyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        anchor: Tensor | None,
        spec: Any,
    ) -> Tensor:
        z, logsumexp = _forward(query, key, value, sinks, spec)
        ctx.save_for_backward(query, key, value, sinks, z, logsumexp)
        ctx.spec = spec
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dz,) = grad_outputs
        query, key, value, sinks, z, logsumexp = ctx.saved_tensors
        needs_query, needs_key, needs_value, needs_sinks, needs_anchor, _ = ctx.needs_input_grad
        work = accumulation_dtype(query.dtype)
        delta = (dz.to(work) * z.to(work)).sum(-1)
        if device.backward_served(query, key, value, ctx.spec):
            dq, dk, dv = device.attention_backward(query, key, value, z, logsumexp, dz, delta, ctx.spec)
        else:
            diagonal = ctx.spec.diagonal_only
            needed = (needs_query, needs_key and not diagonal, needs_value and not diagonal)
            dq, dk, dv = tiled_backward(query, key, value, logsumexp, dz, delta, ctx.spec, needed)
            if diagonal and (needs_key or needs_value):
                dk, dv = device.diagonal_gradients(query, key, value, logsumexp, dz, delta, ctx.spec)
        dsinks = None
        if needs_sinks:
            dsinks = -(torch.exp(sinks.to(work)[:, None] - logsumexp) * delta).sum((0, 2)).to(sinks.dtype)
        danchor = dz.new_zeros(()) if needs_anchor else None
        return dq, dk, dv, dsinks, danchor, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Return z and the logsumexp of each row's scores, sink included."""
    banded = spec.window is not None and spec.window < query.shape[2]
    flash = query.device.type == "cpu" and value.shape[-1] == query.shape[-1]
    if device.flash_serves(query, key, value, spec):
        z, logsumexp = device.flash_forward(query, key, value, spec.scale)
    elif flash and not banded and spec.softcap is None:
        z, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=spec.scale
        )
    else:
        z, logsumexp = tiled_forward(query, key, value, spec)
    if sinks is not None:
        with_sink = torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype)[:, None])
        z = z * torch.exp(logsumexp - with_sink)[..., None].to(z.dtype)
        logsumexp = with_sink
    return z, logsumexp
