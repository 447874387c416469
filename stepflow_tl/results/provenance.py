"""What made a result: enough to reproduce it and judge its limits."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from stepflow_tl.version import __version__

_PACKAGES = ("torch", "transformer-lens", "transformers", "safetensors")


@dataclass(frozen=True)
class Provenance:
    """The model, objective and software behind one result.

    Attributes:
        model_name: The model's own name, `cfg.model_name`.
        objective: What was differentiated: "per_token", "response", ... or a callable's qualified name.
        backend: The backend that ran, after "auto" was resolved.
        dtype: Floating dtype of the model's weights, such as "torch.float32".
        device: Device of the model's weights.
        versions: Package and Python versions.
        notes: Free facts a backend adds (for instance the per-token self-check's largest error).
    """

    model_name: str
    objective: str
    backend: str
    dtype: str
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers; absent packages are left out.

    This package's own comes from its source, so that a run from a checkout, not installed, has it too.
    """
    found = {"python": platform.python_version(), "stepflow-tl": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
