"""A short trace, three objectives and both backends: what the tests of the layerwise backend share."""

import torch

from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.layerwise import layerwise_backend
from stepflow_tl.saliency.objectives import Objective

N_TOKENS = 14
N_LAYERS = 4


def step_ids() -> torch.Tensor:
    """Template, question, two unequal thinking steps, a template gap, a one-token step, a summary."""
    return torch.tensor([-1, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1, 3, 4, 4])


def token_ids() -> torch.Tensor:
    return torch.randint(0, 250, (N_TOKENS,), generator=torch.Generator().manual_seed(0))


def both_backends(model, objective, layers=tuple(range(N_LAYERS))):
    arguments = (model, token_ids(), step_ids(), objective, layers)
    return layerwise_backend(*arguments), hooks_backend(*arguments)


def layerwise(model, objective, layers=tuple(range(N_LAYERS))):
    return layerwise_backend(model, token_ids(), step_ids(), objective, layers)


def per_token():
    return Objective("per_token", torch.arange(1, N_TOKENS), per_token=True)


def mean_nll():
    return Objective("mean", torch.tensor([4, 5, 6, 9, 12]))


def one_logit():
    return Objective("one logit", None, function=lambda logits, tokens: logits[0, 11, 3] - logits[0, 7, 5])


OBJECTIVES = {"per_token": per_token, "mean": mean_nll, "callable": one_logit}
