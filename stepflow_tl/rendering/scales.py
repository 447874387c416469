"""Ways to bring a step map into [0, 1], so that it can be seen.

Raw saliency spans several decades, and depth, row and pooling all move its level. Each scale answers one
question:

- `row_shares`: of what step i draws on, which part comes from step j? Each row sums to 1, as in `diagnose`.
- `share_decades`: the same on a logarithmic scale, so that a share of 1 % can still be seen.
- `row_max`: the same picture with every row stretched to its own strongest source.
- `log_decades`: how strong is the pair compared with the strongest pair of all the maps shown together?

All are pure, keep zeros at zero, and never return NaN: a row without any mass stays zero.
"""

import torch
from jaxtyping import Float
from torch import Tensor

DECADES = 3


def row_shares(
    maps: Float[Tensor, "*map query_step key_step"],
) -> Float[Tensor, "*map query_step key_step"]:
    """Divide each row by its sum; rows without mass stay 0."""
    return _ratio(maps, maps.sum(dim=-1, keepdim=True))


def row_max(maps: Float[Tensor, "*map query_step key_step"]) -> Float[Tensor, "*map query_step key_step"]:
    """Divide each row by its largest entry; rows without mass stay 0."""
    if maps.numel() == 0:
        return maps.clone()
    return _ratio(maps, maps.amax(dim=-1, keepdim=True))


def share_decades(
    maps: Float[Tensor, "*map query_step key_step"], decades: int = DECADES
) -> Float[Tensor, "*map query_step key_step"]:
    """Each row's shares, 100 % at 1 and `10**-decades` of that, or less, at 0, linearly in log10."""
    return (1 + row_shares(maps).clamp(min=10.0**-decades).log10() / decades).clamp(0, 1)


def log_decades(
    maps: Float[Tensor, "*map query_step key_step"], decades: int = DECADES
) -> Float[Tensor, "*map query_step key_step"]:
    """Map the largest entry of all maps to 1 and `10**-decades` of it, or less, to 0, linearly in log10.

    With three decades, 1, 0.1, 0.01 and 0.0001 become 1, 2/3, 1/3 and 0.
    """
    if maps.numel() == 0 or not bool((maps > 0).any()):
        return torch.zeros_like(maps)
    # The clamp keeps log10 off zero; -decades is where the scale ends anyway.
    relative = (maps / maps.max()).clamp(min=10.0**-decades)
    return (1 + relative.log10() / decades).clamp(0, 1)


def _ratio(
    maps: Float[Tensor, "*map query_step key_step"], by: Float[Tensor, "*map query_step 1"]
) -> Float[Tensor, "*map query_step key_step"]:
    return torch.where(by > 0, maps / torch.where(by > 0, by, 1), 0).to(maps.dtype)
