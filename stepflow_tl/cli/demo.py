"""`stepflow-tl demo`: two traces from nothing but the embedded model, analysed and drawn, offline.

1. `generated`: the model thinks about a bundled question (`thinking`: budget forcing) and the trace is read
   from the token ids it produced.
2. `written`: a bundled trace in the input format of `analyze`, correct, written for this package.
3. For each: Step-Saliency, the table of `diagnose`, a result file, figures, the interactive view and the
   report page.
"""

import textwrap
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from stepflow_tl.cli.console import say
from stepflow_tl.cli.thinking import generate_with_thinking
from stepflow_tl.diagnosis import diagnose
from stepflow_tl.errors import InputFileError, MissingExtraError
from stepflow_tl.models import loading as models
from stepflow_tl.results.files import write_atomically
from stepflow_tl.results.tables import printable
from stepflow_tl.runs.records import Record, read_records
from stepflow_tl.runs.run import make_folder
from stepflow_tl.saliency import step_saliency
from stepflow_tl.trace import ReasoningTrace

_DATA = files("stepflow_tl.cli").joinpath("data")
_FIGURE_DPI = 200
_ANSWER_START = "Final answer:"

HOW_TO_READ = """\
How to read it
  Row i of a map says which earlier steps step i draws on: Q question, T1, T2, ... thinking, S1, ... answer.
  Shares of a row sum to 1; the diagonal is what a step draws from itself. TEMPLATE tokens are counted apart.
  lock_in, shallow layers: near 1, a thinking step draws on itself and reaches little of what came before.
  decay_slope: below 0, the answer turns away from the thinking over the deep half of the layers.
  One trace gives numbers, not verdicts: compare groups with stepflow-tl analyze ... --group-by is_correct."""


@dataclass(frozen=True)
class DemoOptions:
    """The command line of the demo; the budgets are in tokens."""

    out: Path
    thinking_budget: int = 200
    answer_budget: int = 60


def demo(options: DemoOptions) -> int:
    """Run the demo and return the exit code.

    Raises:
        MissingExtraError: If the embedded model is not installed.
        InputFileError: If the folder cannot be made.
    """
    make_folder(options.out)
    started = time.perf_counter()
    say("loading the embedded model")
    model = models.load_default_model()
    written = [
        *_show("generated", _generated_trace(model, options), model, options.out),
        *_show("written", _written_trace(model), model, options.out),
    ]
    print(f"\nWritten in {time.perf_counter() - started:.0f} s:", *written, sep="\n  ")
    print(f"\n{HOW_TO_READ}")
    return 0


def bundled_question() -> str:
    """The question that the model thinks about."""
    return _DATA.joinpath("demo_question.txt").read_text(encoding="utf-8").strip()


def bundled_record() -> Record:
    """The written trace."""
    with as_file(_DATA.joinpath("written_trace.jsonl")) as path:
        record = next(read_records(path))
    if not isinstance(record, Record):
        raise InputFileError(f"the bundled trace is damaged: {record.reason}. Install stepflow-tl again")
    return record


def _generated_trace(model: Any, options: DemoOptions) -> ReasoningTrace:
    question = bundled_question()
    say(f"the model thinks, at most {options.thinking_budget} tokens, and answers")
    generated = generate_with_thinking(
        model,
        question,
        answer_start=_ANSWER_START,
        thinking_budget=options.thinking_budget,
        answer_budget=options.answer_budget,
    )
    trace = ReasoningTrace.from_tokens(model.tokenizer, generated.tokens, splitter="line")
    print(f"(a) A trace the model wrote itself.\n{_wrapped(question)}")
    print(
        "    This model was not trained to think. Budget forcing made it: <think> was opened for it in the\n"
        f"    prompt, </think> and {_ANSWER_START!r} were written for it. Decoding is greedy,\n"
        "    and a line is a step.\n"
        f"    {generated.n_thinking} thinking tokens, ended {generated.ended}; "
        f"{generated.n_answer} answer tokens.\n"
        "    It is a small model and may well be wrong; that is part of the picture."
    )
    return trace


def _written_trace(model: Any) -> ReasoningTrace:
    record = bundled_record()
    print(f"\n(b) A written trace, correct, read through the same model.\n{_wrapped(record.question)}")
    return ReasoningTrace.from_parts(model.tokenizer, record.question, record.thinking, record.summary)


def _show(name: str, trace: ReasoningTrace, model: Any, out: Path) -> list[Path]:
    """Analyse one trace, print its steps and its table, and write its files."""
    print(f"\n{_printable_lines(trace.table(width=72))}\n")
    saliency = step_saliency(model, trace)
    diagnosis = diagnose(saliency)
    print(diagnosis)
    transcript = out / f"{name}.txt"
    write_atomically(transcript, trace.text.encode("utf-8"))
    paths = [transcript, saliency.save(out / f"{name}.safetensors")]
    from stepflow_tl.rendering import profile_figure, report, save_figure, show_step_maps, step_map_figure

    title = f"{name} trace: {saliency.provenance.model_name}"
    try:
        maps, profile = step_map_figure(saliency, title=title), profile_figure(diagnosis, title=title)
        paths.append(save_figure(maps, out / f"{name}.maps.png", dpi=_FIGURE_DPI))
        paths.append(save_figure(profile, out / f"{name}.profile.png", dpi=_FIGURE_DPI))
    except MissingExtraError as error:
        say(f"no figures: {error}")
    paths.append(show_step_maps(saliency).save(out / f"{name}.html"))
    paths.append(report(saliency, out / f"{name}.report.html", title=title))
    return paths


def _wrapped(question: str) -> str:
    return textwrap.fill(f"Question: {question}", 100, initial_indent="    ", subsequent_indent="    ")


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))
