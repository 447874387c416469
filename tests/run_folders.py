"""Run folders made by hand: results of tiny maps, and the manifest that `analyze` would write of them."""

import json
from pathlib import Path
from typing import Any

from diagnostic_maps import random_saliency

from stepflow_tl import diagnose
from stepflow_tl.results.files import file_digest
from stepflow_tl.runs.manifest import Done

HEADER = {
    "schema": 1,
    "kind": "header",
    "settings": {
        "model_name": "tiny",
        "objective": "per_token",
        "dtype": "torch.float64",
        "layers": [0, 1, 2, 3],
        "n_layers": 4,
        "splitter": "paragraph",
        "format": "think",
    },
    "stepflow_tl": "0.1.0",
}


def result(seed: int, **options: Any) -> Any:
    """A map of four layers; even seeds lock in more."""
    return random_saliency("QTTTTSS", seed, diagonal=0.5 * (seed % 2 == 0), **options)


def done(folder: Path, name: str, saliency: Any, **changes: Any) -> dict[str, Any]:
    """Save a result and return its manifest line."""
    path = saliency.save(folder / f"{name}.safetensors")
    line = Done(
        id=name,
        line=1,
        file=path.name,
        n_tokens=len(saliency.trace),
        seconds=0.5,
        group=None,
        pair=None,
        sha256=file_digest(path),
        diagnosis=diagnose(saliency),
    )
    return {**line.to_json(), **changes}


def failed(name: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "failed", "id": name, "line": 1, "reason": "too long", "error": "ModelError", **changes}


def write_manifest(folder: Path, *lines: Any, name: str = "manifest.jsonl", header: Any = HEADER) -> Path:
    """Header and lines (dicts, or raw text) as a manifest."""
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (header, *lines)]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def make_run(folder: Path, n: int = 8, **changes: Any) -> list[dict[str, Any]]:
    """A run of n traces, grouped and paired by two; returns the manifest's lines."""
    lines = [
        done(folder, f"t{i}", result(i), line=i + 1, group=i % 2 == 0, pair=f"p{i // 2}", **changes)
        for i in range(n)
    ]
    write_manifest(folder, *lines)
    return lines
