"""Fused attention on an NVIDIA GPU: flash attention for z, dq, dk and dv, a Triton kernel for the pooled map.

1. Forward: PyTorch's flash kernel, where it serves; it returns the logsumexp of each row as well.
2. Backward, ordinary objectives: PyTorch's flash backward gives dq, dk and dv from that logsumexp, and
   `pool_on_device` the map. An attention sink is in the logsumexp and in z already, and the flash backward
   uses nothing else of the softmax, so it holds with sinks too.
3. Backward, `diagonal_only`: `pool_on_device` gives the map and dq in one sweep of three matrix products; dk
   and dv are the diagonal's, O(T). Windows, soft-caps and sinks are all served. The flash backward is not
   used: it would spend five products to throw two of its three gradients away.

The flash backward adds up dq in no fixed order unless PyTorch is told otherwise, so it is told: equal inputs
give equal bits. What is not served here (float64, ordinary objectives under a window or a soft-cap, no
Triton) goes through the tiles of `sweep`, on any device.

Memory: as `attention`, plus what the two kernels need for themselves (`triton_pooling.LINE_BYTES`; flash
attention's float32 copy of dq, a few times over in its deterministic mode).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.saliency.fused.spec import AttentionSpec
from stepflow_tl.saliency.fused.triton_pooling import available, pool_on_device


def flash_serves(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """Whether PyTorch's flash kernels compute this call, forward and backward."""
    if not query.is_cuda or spec.softcap is not None or query.shape[-1] % 8:
        return False
    if spec.window is not None and spec.window < query.shape[2]:
        return False
    grouped = query.shape[1] != key.shape[1]
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, grouped)
    return query.shape[-1] == value.shape[-1] and torch.backends.cuda.can_use_flash_attention(parameters)


def backward_served(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """Whether `attention_backward` computes this call."""
    kernel = query.is_cuda and available(query.device, query.dtype)
    if spec.diagonal_only:
        return kernel
    return (kernel or spec.step_sums is None) and flash_serves(query, key, value, spec)


def flash_forward(
    query: Float[Tensor, "batch head token d_head"],
    key: Float[Tensor, "batch kv_head token d_head"],
    value: Float[Tensor, "batch kv_head token d_head"],
    scale: float,
) -> tuple[Float[Tensor, "batch head token d_head"], Float[Tensor, "batch head token"]]:
    """Causal attention: z, and the natural logarithm of each row's normaliser in float32."""
    z, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, scale=scale
    )
    return z, logsumexp


def attention_backward(
    query: Float[Tensor, "batch head token d_head"],
    key: Float[Tensor, "batch kv_head token d_head"],
    value: Float[Tensor, "batch kv_head token d_value"],
    z: Float[Tensor, "batch head token d_value"],
    logsumexp: Float[Tensor, "batch head token"],
    dz: Float[Tensor, "batch head token d_value"],
    delta: Float[Tensor, "batch head token"],
    spec: AttentionSpec,
) -> tuple[
    Float[Tensor, "batch head token d_head"],
    Float[Tensor, "batch kv_head token d_head"],
    Float[Tensor, "batch kv_head token d_value"],
]:
    """Add the token saliency to `spec.step_sums` and return dq, dk and dv.

    Args:
        query: Queries; consecutive heads share a KV head.
        key: Keys.
        value: Values.
        z: What the forward pass returned, sink included.
        logsumexp: Natural logarithm of each row's normaliser, after scale and soft-cap, sink included.
        dz: dL/dz.
        delta: `<dz, z>` of each row.
        spec: As in the forward pass; `backward_served` must hold.
    """
    if spec.diagonal_only:
        dq = torch.empty_like(query)
        for batch in range(query.shape[0]):
            own_dq = _pool(query, key, value, logsumexp, dz, delta, spec, batch)
            if own_dq is not None:
                dq[batch] = own_dq
        dk, dv = diagonal_gradients(query, key, value, logsumexp, dz, delta, spec)
        return dq, dk, dv
    if spec.step_sums is not None:
        for batch in range(query.shape[0]):
            _pool(query, key, value, logsumexp, dz, None, spec, batch)
    n_tokens = query.shape[2]
    # The state of the dropout's random numbers, which nothing reads without dropout.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    with _deterministic():
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dz,
            query,
            key,
            value,
            z,
            logsumexp,
            None,
            None,
            n_tokens,
            n_tokens,
            0.0,
            True,
            state,
            state[:0],
            scale=spec.scale,
        )


def _pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    dz: Tensor,
    delta: Tensor | None,
    spec: AttentionSpec,
    batch: int,
) -> Tensor | None:
    """Pool one sequence into `spec.step_sums`, if wanted, and return its dq if `delta` is given."""
    target = spec.step_sums
    sums, dq = pool_on_device(
        query[batch],
        key[batch],
        value[batch],
        dz[batch],
        logsumexp[batch],
        None if target is None else target.tiles.step_ids,
        0 if target is None else target.tiles.n_steps,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        delta=None if delta is None else delta[batch],
    )
    if target is not None and sums is not None:
        target.sums += sums.to(target.sums.dtype)
        target.reached = True
    return dq


def diagonal_gradients(
    query: Float[Tensor, "batch head token d_head"],
    key: Float[Tensor, "batch kv_head token d_head"],
    value: Float[Tensor, "batch kv_head token d_value"],
    logsumexp: Float[Tensor, "batch head token"],
    dz: Float[Tensor, "batch head token d_value"],
    delta: Float[Tensor, "batch head token"],
    spec: AttentionSpec,
) -> tuple[Float[Tensor, "batch kv_head token d_head"], Float[Tensor, "batch kv_head token d_value"]]:
    """Each token's dk and dv through its own query alone: `dk_t = scale ds_tt q_t`, `dv_t = A_tt dz_t`."""
    dk, dv = torch.empty_like(key), torch.empty_like(value)
    work = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    for kv_head in range(key.shape[1]):  # one KV head at a time: the float32 copies stay small
        heads = slice(kv_head * groups, (kv_head + 1) * groups)
        q, own_dz = query[:, heads].to(work), dz[:, heads].to(work)
        scores = torch.einsum("bhtd,btd->bht", q, key[:, kv_head].to(work)) * spec.scale
        slope = 1.0
        if spec.softcap is not None:
            bounded = torch.tanh(scores / spec.softcap)
            scores, slope = bounded * spec.softcap, 1 - bounded.square()
        pattern = torch.exp(scores - logsumexp[:, heads])
        dpattern = torch.einsum("bhtd,btd->bht", own_dz, value[:, kv_head].to(work))
        dscores = pattern * (dpattern - delta[:, heads]) * slope
        dk[:, kv_head] = torch.einsum("bht,bhtd->btd", dscores * spec.scale, q).to(dk.dtype)
        dv[:, kv_head] = torch.einsum("bht,bhtd->btd", pattern, own_dz).to(dv.dtype)
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
