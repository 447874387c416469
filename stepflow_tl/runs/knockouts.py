"""The causal part of a run: a knockout of each trace, and how well the maps agree.

1. Per trace: keep an earlier knockout that is the same measurement, else cut every pair of steps in the
   layers of the saliency map, by NLL, and save it as `knockout/<name>.safetensors`.
2. Saliency, raw attention, knockout and nearness are compared on that trace (`causal.agreement`).
3. At the end: the table of means with intervals over traces, `agreement.csv` with the values of each trace,
   and `agreement.json` with the table.
"""

import csv
import io
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stepflow_tl.causal import step_knockout
from stepflow_tl.causal.agreement import MEASURES, TraceAgreement, score_maps, trace_agreement
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs.kept_results import DamagedResultError, Settings, kept_knockout
from stepflow_tl.runs.memory import knockout_rungs, with_less_and_less
from stepflow_tl.runs.outcomes import Outcome
from stepflow_tl.saliency import StepSaliency

FOLDER = "knockout"


class Knockouts:
    """Knockout and agreement, trace by trace."""

    def __init__(self, model: Any, out: Path, settings: Settings, overwrite: bool) -> None:
        """Make the folder.

        Raises:
            InputFileError: If that cannot be done.
        """
        self._model, self._overwrite = model, overwrite
        self._settings = replace(settings, objective="nll")
        self._folder = out / FOLDER
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputFileError(f"{self._folder} cannot be made: {error.strerror or error}") from error

    def measure(
        self, saliency: StepSaliency, name: str, known: TraceAgreement | None, note: Callable[[str], None]
    ) -> tuple[TraceAgreement, float]:
        """Agreement of a trace's maps, and the seconds that its knockout took; 0 where it was kept.

        Args:
            saliency: The trace's map.
            name: Name of the result file.
            known: Its agreement by the manifest, returned where the knockout is kept.
            note: Takes what happened on the way.

        Raises:
            StepflowError: If the trace has no pair of steps, or another result is in the way.
        """
        path, knockout, seconds = self._folder / name, None, 0.0
        if not self._overwrite:
            try:
                knockout = kept_knockout(path, saliency.trace, self._settings)
            except DamagedResultError as error:
                note(f"knockout measured again, because {error}")
        if knockout is not None and known is not None:
            return known, 0.0
        if knockout is None:
            started = time.perf_counter()
            run = partial(step_knockout, self._model, saliency.trace, layers=saliency.layers)
            knockout = with_less_and_less(run, knockout_rungs(), note)
            seconds = time.perf_counter() - started
            knockout.save(path)
        maps = score_maps(self._model, saliency, knockout)
        return trace_agreement(maps, knockout.measured.numpy()), seconds


def agreement_csv(outcomes: Iterable[Outcome]) -> str:
    """The agreement of each trace, one row a pair of scores."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["line", "id", "score", "other_score", *MEASURES, "top_k_chance", "n_pairs"])
    for outcome in outcomes:
        agreement = outcome.agreement
        if agreement is None:
            continue
        for (name, other), values in agreement.values.items():
            numbers = [*(values[measure] for measure in MEASURES), agreement.top_k_chance]
            cells = ["" if math.isnan(value) else value for value in numbers]
            writer.writerow([outcome.line, outcome.id, name, other, *cells, agreement.n_pairs])
    return buffer.getvalue()
