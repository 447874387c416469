"""The device that a command line names, if it is there."""

import torch

from stepflow_tl.errors import ModelError


def present_device(name: str) -> torch.device:
    """The device `--device` names.

    Raises:
        ModelError: If it is a GPU, and torch sees none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {name}: there is no CUDA device here, or torch was built without")
    return device
