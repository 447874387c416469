"""The model that a command line names, on the device that it names."""

from pathlib import Path
from typing import Any

import torch

from stepflow_tl.cli.arguments import TESTBEDS
from stepflow_tl.errors import ModelError
from stepflow_tl.models import loading as models
from stepflow_tl.testbed import model as testbed


def load(name: str, device: str, dtype: str, device_map: str | None) -> Any:
    """The model of the command line; at module level, so that another process can call it.

    Args:
        name: As for `models.load_model`, "testbed", "testbed-12", or a folder of a testbed model.
        device: Where it goes.
        dtype: Of its weights.
        device_map: In place of `device`, as for `models.load_model`.

    Raises:
        ModelError: If it cannot be loaded, or the device is a GPU and torch sees none.
    """
    where, kind = torch.device(device), getattr(torch, dtype)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {device}: there is no CUDA device here, or torch was built without")
    if name in TESTBEDS:
        return testbed.load_testbed_model(where, kind, n_layers=TESTBEDS[name])
    if (Path(name) / "checksums.json").is_file():
        return testbed.load_testbed_model(where, kind, folder=name)
    place = {} if device_map is None else {"device_map": device_map}
    return models.load_model(name, device=where, dtype=kind, **place)
