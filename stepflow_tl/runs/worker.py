"""One model and what is done with a trace: reuse or compute its result, and record it as a manifest entry.

1. Before the first trace: hook points, layers and format are checked, and for `per_token` the one-pass trick
   is, on a fixed text. So what stands in a result about that check does not depend on which trace came first.
2. Per trace: build it; keep the result that is there if it is the same analysis of the same trace, else
   compute it, with less memory if it has to be (`memory`), and save it atomically.
3. Diagnose it, unless the manifest already has the measures of this very file, told by its SHA-256.
4. With a `StepFlow` among the options, every pass of a trace runs under it: the map is that of the repaired
   flow, and is never taken for the plain one.
5. With `causal`, likewise for a knockout of every pair of steps in the layers of the map, by NLL, saved as
   `knockout/<name>.safetensors`; then saliency, raw attention, knockout and nearness are compared on it
   (`causal.agreement`). "screened" cuts alone what this very map ranks first, and compares these pairs only.
6. Whatever goes wrong with a trace becomes its `Failed` entry. A full disk is no trace's fault and ends the
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

from stepflow_tl.causal import StepKnockout, step_knockout
from stepflow_tl.causal.agreement import TraceAgreement, score_maps, trace_agreement
from stepflow_tl.causal.knockout_result import TOLERANCE
from stepflow_tl.causal.screening import TOP, screening_note
from stepflow_tl.diagnosis import Diagnosis, diagnose
from stepflow_tl.errors import DiskFullError, InputFileError, StepflowError
from stepflow_tl.models.facts import check_layers, model_facts, tokenizer_of
from stepflow_tl.models.hook_names import resolve_hooks
from stepflow_tl.models.passes import attached
from stepflow_tl.rendering import profile_figure, save_figure, step_map_figure
from stepflow_tl.results.files import file_digest, is_disk_full
from stepflow_tl.results.tables import printable
from stepflow_tl.runs.kept_results import DamagedResultError, KeptIf, Result, kept_result
from stepflow_tl.runs.manifest import Done, Failed, RunSettings
from stepflow_tl.runs.memory import (
    OutOfMemoryError,
    is_out_of_memory,
    knockout_rungs,
    return_freed_memory,
    saliency_rungs,
    with_less_and_less,
)
from stepflow_tl.runs.options import PER_TOKEN, SPLITTERS, RunOptions
from stepflow_tl.runs.outcomes import Outcome
from stepflow_tl.runs.plan import Task
from stepflow_tl.runs.records import Record, pair_field
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.saliency.backends import check_ahead
from stepflow_tl.stepflow.standing import standing_hooks
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.formats import resolve_format

KNOCKOUTS = "knockout"
"""Folder of the knockouts, in that of the results."""

_FIGURE_DPI = 150
_TRIM_EVERY = 16  # traces
_PROBE = ("What is 2+3?", "2+3 is 5.", "5")

Note = Callable[[str], None]


class Worker:
    """A model, ready to analyse traces into a folder."""

    def __init__(self, model: Any, options: RunOptions, out: Path) -> None:
        """Check what no trace could survive.

        Raises:
            ModelError: If the model lacks a tokenizer, hook points or layers, or `per_token` does not hold on
                it.
            FormatError: If the format is unknown or cannot be told from the tokenizer.
            InputFileError: If a folder cannot be made.
        """
        self._model, self._options, self._out = model, options, out
        self._n_taken = 0
        is_per_token = options.objective in PER_TOKEN
        if is_per_token:  # attention must be all that mixes positions, so there is a pattern in every layer
            resolve_hooks(model)
        facts = model_facts(model)
        layers = check_layers(facts, options.layers)
        if not is_per_token:
            resolve_hooks(model, layers)
        self._format = resolve_format(tokenizer_of(model), options.format)
        self._splitter = options.splitter or SPLITTERS[0]
        self.settings = RunSettings(
            model_name=facts.name,
            objective=options.objective,
            dtype=str(facts.dtype),
            layers=layers,
            n_layers=facts.n_layers,
            splitter=self._splitter,
            format=self._format.name,
            stepflow=None if options.stepflow is None else repr(options.stepflow),
        )
        self._kept_if = KeptIf(
            facts.name, options.objective, str(facts.dtype), layers, self.settings.stepflow
        )
        if options.causal:
            try:
                (out / KNOCKOUTS).mkdir(exist_ok=True)
            except OSError as error:
                reason = error.strerror or error
                raise InputFileError(f"{out / KNOCKOUTS} cannot be made: {reason}") from error
        if is_per_token:
            question, thinking, summary = _PROBE
            probe = ReasoningTrace.from_parts(
                model.tokenizer, question, thinking, summary, format=self._format
            )
            check_ahead(model, probe.tokens)

    def take(self, task: Task) -> Outcome:
        """Deal with one trace.

        Args:
            task: The trace, the name of its file, and what the manifest says of it.

        Raises:
            DiskFullError: If there is no room for its result.
        """
        record, notes = task.record, []
        self._n_taken += 1
        if self._n_taken % _TRIM_EVERY == 0:
            return_freed_memory()
        try:
            found = self._take(task, lambda message: notes.append(f"{record.place}: {message}"))
            return replace(found, notes=tuple(notes))
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
        return replace(failure(record, reason, name, self._options), notes=tuple(notes))

    def _take(self, task: Task, note: Note) -> Outcome:
        record, options, path = task.record, self._options, self._out / task.file
        trace = self._trace(record)
        result = self._kept(StepSaliency, path, trace, self._kept_if, "analysed again", note)
        is_new, seconds, diagnosis, known = result is None, 0.0, None, None
        if result is None:
            run = partial(
                step_saliency,
                self._model,
                trace,
                objective=options.objective,
                layers=options.layers,
                stepflow=options.stepflow,
            )
            started = time.perf_counter()
            result = with_less_and_less(run, saliency_rungs(), note)
            seconds = time.perf_counter() - started
            diagnosis = diagnose(result)  # before it is saved: a map that cannot be diagnosed is none
            result.save(path)
        sha256 = file_digest(path)
        before = task.previous
        if not is_new and isinstance(before, Done) and (before.file, before.sha256) == (task.file, sha256):
            diagnosis, known = before.diagnosis, before.agreement
        if diagnosis is None or (options.figures and not is_new):  # a manifest has no reasons, a figure does
            diagnosis = diagnose(result)
        if options.figures:
            _save_figures(result, diagnosis, path, record.id)
        agreement = known
        if options.causal:
            agreement, spent = self._agreement(result, path.name, known, note)
            seconds += spent
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
            group_by=options.group_by,
            pair_by=pair_field(options),
        )
        status = "analysed" if is_new else "kept"
        return Outcome(record.id, status, line=record.line, unit=record.unit, entry=entry, seconds=seconds)

    def _kept(
        self, kind: type[Result], path: Path, trace: ReasoningTrace, wanted: KeptIf, again: str, note: Note
    ) -> Result | None:
        """The result of an earlier run that can stand for this run's; a damaged one is noted, and none."""
        if self._options.overwrite:
            return None
        try:
            return kept_result(path, trace, wanted, kind)
        except DamagedResultError as error:
            note(f"{again}, because {error}")
            return None

    def _agreement(
        self, saliency: StepSaliency, name: str, known: TraceAgreement | None, note: Note
    ) -> tuple[TraceAgreement, float]:
        """Agreement of a trace's maps, and the seconds that its knockout took; 0 where that was kept.

        Raises:
            StepflowError: If the trace has no pair of steps, or another result is in the way.
        """
        path, flow, seconds = self._out / KNOCKOUTS / name, self._options.stepflow, 0.0
        screening, how = None, {}
        if self._options.causal == "screened":
            screening = screening_note(TOP, TOLERANCE)
            how = {"pairs": "screened", "top": TOP, "tolerance": TOLERANCE, "ranking": saliency}
        wanted = replace(self._kept_if, objective="nll", screening=screening)
        knockout = self._kept(StepKnockout, path, saliency.trace, wanted, "knockout measured again", note)
        if knockout is not None and known is not None:
            return known, 0.0
        if knockout is None:
            run = partial(
                step_knockout, self._model, saliency.trace, layers=saliency.layers, stepflow=flow, **how
            )
            started = time.perf_counter()
            knockout = with_less_and_less(run, knockout_rungs(), note)
            seconds = time.perf_counter() - started
            knockout.save(path)
        with attached(self._model, last=standing_hooks(self._model, saliency.trace, stepflow=flow)):
            maps = score_maps(self._model, saliency, knockout)
        in_groups = knockout.bounds.isfinite()
        return trace_agreement(maps, knockout.measured.numpy(), n_grouped=int(in_groups.sum())), seconds

    def _trace(self, record: Record) -> ReasoningTrace:
        tokenizer, splitter = self._model.tokenizer, self._splitter
        if record.tokens is not None:
            trace = ReasoningTrace.from_tokens(
                tokenizer, record.tokens, format=self._format, splitter=splitter
            )
            if not _holds(trace.text, record.question):
                raise InputFileError(
                    "its tokens do not read as its question: expected those of this model's tokenizer; are "
                    "they another model's?"
                )
            return trace
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


def failure(record: Record, reason: str, error: str, options: RunOptions) -> Outcome:
    """What became of a trace that failed.

    Args:
        record: Its row.
        reason: Why.
        error: Class of the error.
        options: Of the run.
    """
    entry = Failed(record.id, record.line, reason, error, digest(record, options))
    return Outcome(record.id, "failed", reason, record.line, record.unit, entry)


def digest(record: Record, options: RunOptions) -> str:
    """Stands for a row's text and what was asked of it; a failure is remembered while it is the same."""
    texts = [record.id, record.question, record.thinking, record.summary, record.text]
    tokens = [] if record.tokens is None else [record.tokens]
    causal = options.causal == "all" or options.causal or False  # as it was written when it was a flag
    text = json.dumps([*texts, causal, options.figures, *tokens])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _holds(text: str, question: str) -> bool:
    """Whether a transcript holds its question, letters and digits: templates strip, tokenizers normalise."""
    plain = ["".join(filter(str.isalnum, normalize("NFKC", part).casefold())) for part in (text, question)]
    return plain[1] in plain[0]


def _save_figures(result: StepSaliency, diagnosis: Diagnosis, path: Path, trace_id: str) -> None:
    title = f"{printable(trace_id)[:60]}: {result.provenance.model_name}"
    maps = step_map_figure(result, title=title)
    save_figure(maps, path.with_suffix(".maps.png"), dpi=_FIGURE_DPI)
    profile = profile_figure(diagnosis, title=title)
    save_figure(profile, path.with_suffix(".profile.png"), dpi=_FIGURE_DPI)
