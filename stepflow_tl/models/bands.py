"""Which layers are shallow, which are deep: the one place that says so.

Both bands hold `n_layers // 4` layers, at least one (docs/method.md section 5; paper: the bottom and the top
quarter). The quotient is rounded down, so a band never reaches past its quarter: L = 28 gives 0..6 and
21..27, L = 30 gives 0..6 and 23..29. From two layers on the bands are disjoint; a model of one layer has that
layer in both.

The deep half, over which the decay slope is fitted, starts at `n_layers // 2`: with an odd number of layers
it takes the middle one. A model without a layer is refused with a ValueError.
"""

from __future__ import annotations


def shallow_band(n_layers: int) -> range:
    """Layers of the bottom quarter."""
    return range(_band_size(n_layers))


def deep_band(n_layers: int) -> range:
    """Layers of the top quarter."""
    return range(n_layers - _band_size(n_layers), n_layers)


def deep_half(n_layers: int) -> range:
    """Layers of the upper half."""
    _band_size(n_layers)
    return range(n_layers // 2, n_layers)


def named_layers(name: str, n_layers: int) -> range:
    """Layers of "all", "shallow" or "deep".

    Raises:
        ValueError: If the name is none of these.
    """
    if name == "all":
        return range(n_layers)
    if name in ("shallow", "deep"):
        return shallow_band(n_layers) if name == "shallow" else deep_band(n_layers)
    raise ValueError(f"layers is {name!r}: expected 'all', 'shallow', 'deep', or layer numbers")


def _band_size(n_layers: int) -> int:
    if n_layers < 1:
        raise ValueError(f"a model of {n_layers} layers has no bands: n_layers must be at least 1")
    return max(1, n_layers // 4)
