"""What a run does with each trace."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnalysisOptions:
    """The same for every trace of a run; plain data, so that it travels to other processes.

    Attributes:
        objective: As in `step_saliency`, by name.
        layers: Layers to keep; all by default.
        splitter: How thinking and summary are cut into steps, by name.
        format: Reasoning format, or "auto" to read it off the tokenizer's chat template.
        causal: Also measure a knockout of every pair of steps.
        figures: Also draw step maps and profiles.
        overwrite: Analyse again where a result is there already.
    """

    objective: str = "per_token"
    layers: tuple[int, ...] | None = None
    splitter: str = "paragraph"
    format: str = "auto"
    causal: bool = False
    figures: bool = False
    overwrite: bool = False
