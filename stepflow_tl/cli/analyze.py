"""`stepflow-tl analyze`: Step-Saliency of every trace in a file of JSON lines.

1. Check what can be checked before any work: the file, the folder, the model, its hook points, format and
   layers.
2. Per record: build the trace; keep an earlier result that is the same analysis; else compute, diagnose
   and save, atomically. The same for its knockout, if asked for (`causal`). A record that fails is named with
   its reason and the run goes on.
3. At the end, and after Ctrl-C: `summary.csv`, the table of band means, and the comparison of two groups
   and the agreement of scores if asked for.

Only numbers are held on to, so memory does not grow with the number of traces. Exit codes: 0 if every
line has a result, 1 if one failed, 130 after Ctrl-C; what stops the run before it starts is an exception.
"""

import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepflow_tl import models
from stepflow_tl.cli.causal import CausalCheck, causal_report
from stepflow_tl.cli.console import Progress, printable, say
from stepflow_tl.cli.file_names import FileNames
from stepflow_tl.cli.grouping import DEFAULT_PAIR_FIELD, compare_groups, pairing_field
from stepflow_tl.cli.kept_results import DamagedResultError, Settings, kept_result
from stepflow_tl.cli.outcomes import Outcome, summary_csv, summary_table
from stepflow_tl.cli.records import Record, Unreadable, count_records, read_records
from stepflow_tl.diagnostics import Diagnosis, diagnose
from stepflow_tl.errors import ComparisonError, InputFileError, ModelError, ResultFileError, StepflowError
from stepflow_tl.hook_names import resolve_hooks
from stepflow_tl.result_files import write_atomically
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace_building import resolve_format

_FIGURE_DPI = 150


@dataclass(frozen=True)
class AnalyzeOptions:
    """The command line, checked; see `stepflow-tl analyze --help`."""

    traces: Path
    out: Path
    model: str
    objective: str = "per_token"
    layers: tuple[int, ...] | None = None
    splitter: str = "paragraph"
    format: str = "auto"
    group_by: str | None = None
    pair_by: str | None = None
    unpaired: bool = False
    overwrite: bool = False
    limit: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    figures: bool = False
    causal: bool = False


def analyze(options: AnalyzeOptions) -> int:
    """Run the analysis and return the exit code.

    Raises:
        InputFileError: If the file cannot be read or holds no line, or the folder cannot be made.
        ModelError: If the model cannot be loaded, lacks hook points, or has not the layers asked for.
        FormatError: If the format is unknown or cannot be told from the model's tokenizer.
        MissingExtraError: If figures are asked for and matplotlib is not installed.
    """
    total = count_records(options.traces, options.limit)
    if not total:
        raise InputFileError(f"{options.traces} holds no line: expected JSON lines, one trace a line")
    _make_folder(options.out)
    if options.figures:
        from stepflow_tl.rendering.extras import require

        require("matplotlib", purpose="Drawing figures")
    run = _Run(options)
    say(f"{total} traces from {options.traces}, model {run.settings.model_name}, results in {options.out}")
    outcomes: list[Outcome] = []
    progress = Progress(total)
    was_interrupted = False
    try:
        pair_by = options.pair_by or DEFAULT_PAIR_FIELD
        for record in read_records(
            options.traces,
            group_by=options.group_by,
            pair_by=pair_by if options.group_by else None,
            limit=options.limit,
        ):
            outcome = run.take(record, progress)
            outcomes.append(outcome)
            if outcome.status == "failed":
                progress.note(f"{outcome.place}: {printable(outcome.reason)}")
            progress.advance(outcome.n_tokens, outcome.seconds)
    except KeyboardInterrupt:
        was_interrupted = True
    finally:
        progress.close()
    if was_interrupted:
        say(f"interrupted after {len(outcomes)} of {total} traces; run the same command again to go on")
    is_complete = _report(options, outcomes) and all(outcome.status != "failed" for outcome in outcomes)
    return 130 if was_interrupted else 0 if is_complete else 1


class _Run:
    """The model and what stays the same from trace to trace."""

    def __init__(self, options: AnalyzeOptions) -> None:
        self.options = options
        self.model = _load_model(options)
        self.format = resolve_format(self.model.tokenizer, options.format)
        weights = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        self.settings = Settings(
            model_name=str(self.model.cfg.model_name),
            objective=options.objective,
            dtype=str(next(weights, torch.float32)),
            layers=_checked_layers(self.model, options.layers),
        )
        self.causal = (
            CausalCheck(self.model, options.out, self.settings, options.overwrite) if options.causal else None
        )
        self._names = FileNames()
        self._line_of: dict[str, int] = {}

    def take(self, record: Record | Unreadable, progress: Progress) -> Outcome:
        """Deal with one line; whatever goes wrong with it becomes its outcome."""
        if isinstance(record, Unreadable):
            return Outcome(record.line, "", "failed", record.reason)
        first_line = self._line_of.setdefault(record.id, record.line)
        if first_line != record.line:
            return Outcome(
                record.line, record.id, "failed", f"duplicate id, first on line {first_line}: ids must differ"
            )
        try:
            return self._analyse(record, progress)
        except StepflowError as error:
            reason = str(error)
        except MemoryError:
            reason = "not enough memory for this trace"
        except Exception as error:
            if "out of memory" in str(error) or "can't allocate memory" in str(error):  # torch's, GPU and CPU
                reason = f"not enough memory for this trace ({str(error).splitlines()[0]})"
            else:  # a fault of ours or of a library: named in full, but no reason to lose a night's run
                reason = f"unexpected {type(error).__name__}: {error}"
                progress.note(traceback.format_exc().rstrip())
        return Outcome(record.line, record.id, "failed", reason)

    def _analyse(self, record: Record, progress: Progress) -> Outcome:
        trace = self._trace(record)
        path = self.options.out / f"{self._names.stem(record.id)}.safetensors"
        place = f"line {record.line}, id '{printable(record.id)}'"
        result = self._kept(path, trace, place, progress)
        seconds = 0.0
        if is_new := result is None:
            started = time.perf_counter()
            result = step_saliency(
                self.model, trace, objective=self.options.objective, layers=self.options.layers
            )
            seconds = time.perf_counter() - started
        diagnosis = diagnose(result)
        if is_new:
            result.save(path)
        if self.options.figures:
            _save_figures(result, diagnosis, path, record.id)
        agreement = None
        if self.causal is not None:
            agreement, spent = self.causal.analyse(result, path.name, place, progress)
            seconds += spent
        return Outcome(
            line=record.line,
            id=record.id,
            status="analysed" if is_new else "kept",
            file=path.name,
            n_tokens=len(trace),
            seconds=seconds,
            diagnosis=diagnosis,
            group=record.group,
            pair=record.pair,
            agreement=agreement,
        )

    def _trace(self, record: Record) -> ReasoningTrace:
        tokenizer, splitter = self.model.tokenizer, self.options.splitter
        if record.text is None:
            return ReasoningTrace.from_parts(
                tokenizer,
                record.question,
                record.thinking,
                record.summary,
                format=self.format,
                splitter=splitter,
            )
        question = record.question if record.question and self.format.name == "plain" else None
        return ReasoningTrace.from_text(
            tokenizer, record.text, format=self.format, question=question, splitter=splitter
        )

    def _kept(self, path: Path, trace: ReasoningTrace, place: str, progress: Progress) -> StepSaliency | None:
        if self.options.overwrite:
            return None
        try:
            return kept_result(path, trace, self.settings)
        except DamagedResultError as error:
            progress.note(f"{place}: analysed again, because {error}")
            return None


def _load_model(options: AnalyzeOptions) -> Any:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"--device {options.device}: there is no CUDA device here, or torch was built without"
        )
    model = models.load_model(options.model, device=device, dtype=getattr(torch, options.dtype))
    if getattr(model, "tokenizer", None) is None:
        raise ModelError(f"model {options.model!r} comes without a tokenizer, which the traces need")
    resolve_hooks(model)
    return model


def _checked_layers(model: Any, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    n_layers = int(model.cfg.n_layers)
    outside = [layer for layer in layers or () if layer >= n_layers]
    if outside:
        raise ModelError(f"--layers: the model has layers 0 to {n_layers - 1}; it has no {outside}")
    return tuple(range(n_layers)) if layers is None else layers


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputFileError(f"--out {folder} cannot be made: {error.strerror or error}") from error


def _save_figures(result: StepSaliency, diagnosis: Diagnosis, path: Path, trace_id: str) -> None:
    from stepflow_tl.rendering import profile_figure, save_figure, step_map_figure

    title = f"{printable(trace_id)[:60]}: {result.provenance.model_name}"
    save_figure(step_map_figure(result, title=title), path.with_suffix(".maps.png"), dpi=_FIGURE_DPI)
    save_figure(profile_figure(diagnosis, title=title), path.with_suffix(".profile.png"), dpi=_FIGURE_DPI)


def _report(options: AnalyzeOptions, outcomes: list[Outcome]) -> bool:
    """Write and print the summary; false if a comparison was asked for and cannot be made."""
    written = [_write(options.out / "summary.csv", summary_csv(outcomes))]
    print(summary_table(outcomes))
    if options.causal:
        written += [_write(options.out / name, text) for name, text in causal_report(outcomes).items()]
    is_compared = True
    if options.group_by is not None:
        pair_by = pairing_field(outcomes, options.pair_by, unpaired=options.unpaired)
        try:
            comparison, notes = compare_groups(outcomes, options.group_by, pair_by)
        except ComparisonError as error:
            hint = "" if pair_by is None else " (--unpaired compares without pairing)"
            say(f"no comparison by {options.group_by}: {error}{hint}")
            is_compared = False
        else:
            pairing = "" if pair_by is None else f", paired by {pair_by}"
            print(f"\nBy {options.group_by}{pairing}\n{comparison}", *notes, sep="\n")
            full = f"{comparison}\n\n{comparison.full_table()}\n"
            written += [
                _write(options.out / "comparison.txt", full),
                _write(options.out / "comparison.json", json.dumps(comparison.to_json(), indent=1) + "\n"),
            ]
    print("\nwritten:", *[str(path) for path in written if path], sep="\n  ")
    return is_compared


def _write(path: Path, text: str) -> Path | None:
    try:
        write_atomically(path, text.encode("utf-8", "backslashreplace"))
    except ResultFileError as error:
        say(str(error))
        return None
    return path
