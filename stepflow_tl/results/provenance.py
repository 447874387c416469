"""What made a result: enough to reproduce it and judge its limits."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file's metadata."""
        return {**asdict(self), "versions": dict(self.versions), "notes": dict(self.notes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """Read `to_json`'s data; unknown keys of later versions are ignored.

        Raises:
            KeyError: If a field without a default is missing.
            TypeError: If a field has the wrong type.
        """
        known = {
            f.name: data[f.name] for f in fields(cls) if f.name in data or f.name not in ("versions", "notes")
        }
        for name, value in known.items():
            expected = Mapping if name in ("versions", "notes") else str
            if not isinstance(value, expected):
                raise TypeError(
                    f"provenance field {name!r} is {type(value).__name__}, expected {expected.__name__}"
                )
            if isinstance(value, Mapping) and not all(isinstance(text, str) for text in value.values()):
                raise TypeError(f"provenance field {name!r} must map names to strings")
        return cls(**known)


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
