"""Controls of matched size: the same intervention, aimed at nothing in particular.

* `random_region`: as many keys as the bridge holds, contiguous among the keys of S and B, at a random place.
* `random_direction_like`: a random direction with a given norm.

Both are drawn from a counter-based seed (seed, layer, row, position), so a control does not depend on how the
pass was cut: with a cache, without one, and in a batch with other padding the draws are the same.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

_MASK = (1 << 64) - 1


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed from integers: splitmix64 over the parts, so neighbouring positions share nothing."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def random_region(
    own: Bool[np.ndarray, " key"], bridge: Bool[np.ndarray, " key"], seed: int, row: int, position: int
) -> Bool[np.ndarray, " key"]:
    """A random stretch of the keys in `own` (S) or `bridge` (B), as long as `bridge` has keys.

    `position` is the query's index in its batch row, padding not counted.
    """
    pool = np.flatnonzero(own | bridge)
    size = int(bridge.sum())
    offset = mixed_seed(seed, row, position) % (len(pool) - size + 1)
    region = np.zeros_like(bridge)
    region[pool[offset : offset + size]] = True
    return region


def random_direction_like(
    vectors: Float[Tensor, "kv_head d_head"], seed: int, layer: int, row: int, position: int
) -> Float[Tensor, "kv_head d_head"]:
    """Vectors with the norms of `vectors` and random directions, one per KV head."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, layer, row, position))
    noise = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
    noise /= noise.norm(dim=-1, keepdim=True)
    return (noise.to(vectors.device) * vectors.norm(dim=-1, keepdim=True).double()).to(vectors.dtype)
