"""The causal part of `stepflow-tl analyze --causal`: a knockout of each trace, and how well the maps agree.

1. Per trace: keep an earlier knockout that is the same measurement, else cut every pair of steps in the
   layers of the saliency map, by NLL, and save it as `knockout/<name>.safetensors`.
2. Saliency, raw attention, knockout and nearness are compared on that trace (`causal.agreement`).
3. At the end: the table of means with intervals over traces, `agreement.csv` with the values of each trace,
   and `agreement.json` with the table.
"""

import csv
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepflow_tl.causal import step_knockout
from stepflow_tl.causal.agreement import (
    MEASURES,
    TraceAgreement,
    score_maps,
    summarise_agreement,
    trace_agreement,
)
from stepflow_tl.cli.console import Progress
from stepflow_tl.cli.kept_results import DamagedResultError, Settings, kept_knockout
from stepflow_tl.cli.outcomes import Outcome
from stepflow_tl.errors import InputFileError
from stepflow_tl.saliency import StepSaliency


class CausalCheck:
    """Knockout and agreement, trace by trace."""

    def __init__(self, model: Any, out: Path, settings: Settings, overwrite: bool) -> None:
        """Make the folder.

        Raises:
            InputFileError: If that cannot be done.
        """
        self._model, self._overwrite = model, overwrite
        self._settings = replace(settings, objective="nll")
        self._folder = out / "knockout"
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputFileError(f"{self._folder} cannot be made: {error.strerror or error}") from error

    def analyse(
        self, saliency: StepSaliency, name: str, place: str, progress: Progress
    ) -> tuple[TraceAgreement, float]:
        """Agreement of a trace's maps, and the seconds that its knockout took; 0 where it was kept.

        Args:
            saliency: The trace's map.
            name: Name of the result file.
            place: Where the trace stands in the input, for notes.
            progress: Takes the notes.

        Raises:
            StepflowError: If the trace has no pair of steps, or another result is in the way.
        """
        path, knockout, seconds = self._folder / name, None, 0.0
        if not self._overwrite:
            try:
                knockout = kept_knockout(path, saliency.trace, self._settings)
            except DamagedResultError as error:
                progress.note(f"{place}: knockout measured again, because {error}")
        if knockout is None:
            started = time.perf_counter()
            knockout = step_knockout(self._model, saliency.trace, layers=saliency.layers)
            seconds = time.perf_counter() - started
            knockout.save(path)
        maps = score_maps(self._model, saliency, knockout)
        return trace_agreement(maps, knockout.measured.numpy()), seconds


def causal_report(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Print the table; the files to write, by name."""
    found = [outcome for outcome in outcomes if outcome.agreement is not None]
    if not found:
        return {}
    summary = summarise_agreement([outcome.agreement for outcome in found if outcome.agreement is not None])
    print(f"\n{summary}")
    return {
        "agreement.csv": _csv(found),
        "agreement.json": json.dumps(summary.to_json(), indent=1) + "\n",
    }


def _csv(outcomes: Sequence[Outcome]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["line", "id", "score", "other_score", *MEASURES, "top_k_chance", "n_pairs"])
    for outcome in outcomes:
        agreement = outcome.agreement
        assert agreement is not None
        for (name, other), values in agreement.values.items():
            numbers = [*(values[measure] for measure in MEASURES), agreement.top_k_chance]
            cells = ["" if math.isnan(value) else value for value in numbers]
            writer.writerow([outcome.line, outcome.id, name, other, *cells, agreement.n_pairs])
    return buffer.getvalue()
