"""Let norms and softmaxes that work "in float32" work in float64, so that 1e-8 means something."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def float64_everywhere() -> Iterator[None]:
    """Inside the context `torch.float32` is `torch.float64` and `.float()` is `.double()`.

    transformers and TransformerLens name the type as `torch.float32` or call `.float()`; both are looked up
    when the line runs. Our own modules have tables of types, so they are imported before the names change.
    """
    import torch

    import stepflow_tl.causal.knockout
    import stepflow_tl.saliency.fused.attention
    import stepflow_tl.saliency.layerwise
    import stepflow_tl.saliency.run  # noqa: F401

    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
