"""One model and what is done with a trace: keep a result or make one, and state it as a manifest entry.

1. Before the first trace: hook points, layers and format are checked, and for `per_token` the one-pass trick
   is, on a fixed text. So what stands in a result about that check does not depend on which trace came first.
2. Per trace: build it; keep the result that is there if it is the same analysis of the same trace, else
   compute it, with less memory if it has to be (`memory`), and save it atomically.
3. Diagnose it, unless the manifest already has the measures of this very file, told by its SHA-256.
4. Whatever goes wrong with a trace becomes its `Failed` entry. A full disk is no trace's fault and ends the
   run.

A worker writes result files and nothing else: the manifest has one writer, the driver. Nothing of a trace is
held once it is dealt with.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepflow_tl.diagnosis import Diagnosis, diagnose
from stepflow_tl.errors import DiskFullError, ModelError, StepflowError
from stepflow_tl.models.facts import tokenizer_of
from stepflow_tl.models.hook_names import resolve_hooks
from stepflow_tl.results.files import file_digest, is_disk_full
from stepflow_tl.results.tables import printable
from stepflow_tl.runs.entries import Done, Entry, Failed, RunSettings
from stepflow_tl.runs.kept_results import DamagedResultError, Settings, kept_result
from stepflow_tl.runs.knockouts import Knockouts
from stepflow_tl.runs.memory import (
    OutOfMemoryError,
    is_out_of_memory,
    return_freed_memory,
    saliency_rungs,
    with_less_and_less,
)
from stepflow_tl.runs.options import AnalysisOptions
from stepflow_tl.runs.outcomes import Status
from stepflow_tl.runs.plan import Task
from stepflow_tl.runs.records import Record
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.saliency.backends import check_ahead
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.formats import resolve_format

_FIGURE_DPI = 150
_TRIM_EVERY = 16  # traces
_PROBE = ("What is 2+3?", "2+3 is 5.", "5")


@dataclass(frozen=True)
class Taken:
    """What became of a trace in this run.

    Attributes:
        entry: Its line for the manifest.
        status: Whether a result was made, kept, or neither.
        seconds: Wall-clock time of the analysis; 0 where there was none.
        notes: What happened on the way, for people.
    """

    entry: Entry
    status: Status
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Worker:
    """A model, ready to analyse traces into a folder."""

    def __init__(self, model: Any, options: AnalysisOptions, out: Path) -> None:
        """Check what no trace could survive.

        Raises:
            ModelError: If the model lacks a tokenizer, hook points or layers, or `per_token` does not hold on
                it.
            FormatError: If the format is unknown or cannot be told from the tokenizer.
            InputFileError: If a folder cannot be made.
        """
        self._model, self._options, self._out = model, options, out
        self._n_taken = 0
        layers = _checked_layers(model, options.layers)
        # `per_token` needs attention to be all that mixes positions, so a pattern in every layer.
        resolve_hooks(model, None if options.objective == "per_token" else layers)
        self._format = resolve_format(tokenizer_of(model), options.format)
        weights = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.settings = RunSettings(
            model_name=str(model.cfg.model_name),
            objective=options.objective,
            dtype=str(next(weights, torch.float32)),
            layers=layers,
            n_layers=int(model.cfg.n_layers),
            splitter=options.splitter,
            format=self._format.name,
        )
        s = self.settings
        self._kept_if = Settings(s.model_name, s.objective, s.dtype, s.layers)
        self._knockouts = Knockouts(model, out, self._kept_if, options.overwrite) if options.causal else None
        if options.objective == "per_token":
            question, thinking, summary = _PROBE
            probe = ReasoningTrace.from_parts(
                model.tokenizer, question, thinking, summary, format=self._format
            )
            check_ahead(model, probe.tokens)

    def take(self, task: Task, previous: Entry | None = None) -> Taken:
        """Deal with one trace.

        Args:
            task: The trace and the name of its file.
            previous: Its entry in the manifest, if there is one.

        Raises:
            DiskFullError: If there is no room for its result.
        """
        record, notes = task.record, []
        self._n_taken += 1
        if self._n_taken % _TRIM_EVERY == 0:
            return_freed_memory()

        def note(message: str) -> None:
            notes.append(f"{record.place}: {message}")

        try:
            return self._take(task, previous if isinstance(previous, Done) else None, notes, note)
        except DiskFullError:
            raise
        except StepflowError as error:
            name, reason = type(error).__name__, str(error)
        except Exception as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise DiskFullError(f"no room to write beside {task.file} ({error.strerror})") from error
            name = type(error).__name__
            if is_out_of_memory(error):
                name, reason = OutOfMemoryError.__name__, "not enough memory for this trace"
            else:  # a fault of ours or of a library: named in full, but no reason to lose a night's run
                reason = f"unexpected {name}: {error}"
                notes.append(traceback.format_exc().rstrip())
        failed = Failed(record.id, record.line, reason, name, digest(record, self._options))
        return Taken(failed, "failed", notes=tuple(notes))

    def _take(
        self, task: Task, previous: Done | None, notes: list[str], note: Callable[[str], None]
    ) -> Taken:
        record = task.record
        trace = self._trace(record)
        path = self._out / task.file
        result, seconds = self._kept(path, trace, note), 0.0
        is_new = result is None
        if result is None:
            started = time.perf_counter()
            run = partial(
                step_saliency,
                self._model,
                trace,
                objective=self._options.objective,
                layers=self._options.layers,
            )
            result = with_less_and_less(run, saliency_rungs(), note)
            seconds = time.perf_counter() - started
            diagnosis = _plain(diagnose(result))  # before it is saved: a map that cannot be diagnosed is none
            result.save(path)
            sha256 = file_digest(path)
        else:
            sha256 = file_digest(path)
            is_known = previous is not None and (previous.file, previous.sha256) == (task.file, sha256)
            diagnosis = previous.diagnosis if previous is not None and is_known else _plain(diagnose(result))
            previous = previous if is_known else None
        if self._options.figures:
            _save_figures(result, diagnose(result), path, record.id)
        agreement = previous.agreement if previous is not None and not is_new else None
        if self._knockouts is not None:
            known = previous.read_agreement() if previous is not None and not is_new else None
            found, spent = self._knockouts.measure(result, path.name, known, note)
            agreement, seconds = found.to_json(), seconds + spent
        entry = Done(
            id=record.id,
            line=record.line,
            file=task.file,
            n_tokens=len(trace),
            seconds=round(seconds, 6),
            group=record.group,
            pair=record.pair,
            sha256=sha256,
            diagnosis=diagnosis,
            agreement=agreement,
        )
        return Taken(entry, "analysed" if is_new else "kept", seconds, tuple(notes))

    def _trace(self, record: Record) -> ReasoningTrace:
        tokenizer, splitter = self._model.tokenizer, self._options.splitter
        if record.text is None:
            return ReasoningTrace.from_parts(
                tokenizer,
                record.question,
                record.thinking,
                record.summary,
                format=self._format,
                splitter=splitter,
            )
        question = record.question if record.question and self._format.name == "plain" else None
        return ReasoningTrace.from_text(
            tokenizer, record.text, format=self._format, question=question, splitter=splitter
        )

    def _kept(self, path: Path, trace: ReasoningTrace, note: Callable[[str], None]) -> StepSaliency | None:
        if self._options.overwrite:
            return None
        try:
            return kept_result(path, trace, self._kept_if)
        except DamagedResultError as error:
            note(f"analysed again, because {error}")
            return None


def digest(record: Record, options: AnalysisOptions) -> str:
    """Stands for a row's text and what was asked of it; a failure is remembered while it is the same."""
    fields = [record.id, record.question, record.thinking, record.summary, record.text]
    text = json.dumps([*fields, options.causal, options.figures])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(diagnosis: Diagnosis) -> dict[str, Any]:
    data = diagnosis.to_json()
    return {name: value for name, value in data.items() if name not in ("schema", "version", "reasons")}


def _checked_layers(model: Any, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    n_layers = int(model.cfg.n_layers)
    outside = [layer for layer in layers or () if not 0 <= layer < n_layers]
    if outside:
        raise ModelError(f"--layers: the model has layers 0 to {n_layers - 1}; it has no {outside}")
    return tuple(range(n_layers)) if layers is None else layers


def _save_figures(result: StepSaliency, diagnosis: Diagnosis, path: Path, trace_id: str) -> None:
    from stepflow_tl.rendering import profile_figure, save_figure, step_map_figure

    title = f"{printable(trace_id)[:60]}: {result.provenance.model_name}"
    save_figure(step_map_figure(result, title=title), path.with_suffix(".maps.png"), dpi=_FIGURE_DPI)
    save_figure(profile_figure(diagnosis, title=title), path.with_suffix(".profile.png"), dpi=_FIGURE_DPI)
