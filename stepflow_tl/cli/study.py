"""`stepflow-tl study`: from the question to the conclusion in one folder.

The command line of `runs.study`; options and model are those of `stepflow-tl evaluate`.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stepflow_tl import runs
from stepflow_tl.cli.arguments import DTYPES, add_command, add_options, add_weights, options_of
from stepflow_tl.cli.console import Progress, Watcher, say
from stepflow_tl.cli.evaluate import AnswersWatcher, arguments_of, model_name, questions_of_command
from stepflow_tl.runs.answer_options import AnswerOptions, StudyOptions
from stepflow_tl.runs.flow_options import FlowOptions

_CONDITIONS = ("plain", "StepFlow", "StepFlow control")
_DECIDED_HERE = ("placebo",)  # the conditions are StepFlow and its controls

_EPILOG = """\
input: the questions, as for evaluate.

stages, each of which goes on from the files of the one before when the same command is given again:
  1 answers under the conditions, graded                     answers.jsonl, evaluation.txt
  2 maps of plain answers, right and wrong                   traces.jsonl, maps/
  3 maps of the same answers under StepFlow                  repaired.jsonl, repaired/
  4 right against wrong, with StepFlow against without       findings.json
  5 the report, and a page per answer that it shows          report.md, report.html, pages/
A larger --maps or --pages later adds to what is there.

example:
  stepflow-tl study gsm8k.jsonl --model qwen.gguf --grader maths --format boxed --dtype bfloat16 \\
    --out study --prompt "{question} Please reason step by step, and put your final answer within \\boxed{}."

exit code: 0 done; 1 the disk is full or workers died, the rest is done; 2 the run could not start; 130 after
Ctrl-C.
"""


def add_study(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    summary = "answers, maps, right against wrong, with StepFlow and without, and one report of it all"
    command = add_command(commands, "study", summary, _run, _EPILOG)
    add = command.add_argument
    add("questions", metavar="QUESTIONS.jsonl", help='the questions, "testbed" or "testbed-12"')
    add("--model", metavar="NAME_OR_PATH", help="as for evaluate")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for everything")
    add_options(command, StudyOptions)
    names = ", ".join(_CONDITIONS)
    add("--conditions", nargs="+", metavar="NAME", default=_CONDITIONS, help=f"which conditions ({names})")
    add_options(command, AnswerOptions, without=("conditions",))
    add_options(command, FlowOptions, without=_DECIDED_HERE)
    add_weights(command)
    add("--map-dtype", choices=DTYPES, default="float32", help="weights that are mapped (float32)")


def _run(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.device import load
    from stepflow_tl.rendering.study_conclusions import in_short

    options = options_of(arguments, AnswerOptions, without=("conditions",))
    options = replace(options, conditions=tuple(arguments.conditions))
    asked = arguments_of(options, options_of(arguments, FlowOptions, without=_DECIDED_HERE))
    loaders = {
        dtype: partial(load, model_name(arguments), arguments.device, dtype, arguments.device_map)
        for dtype in (arguments.dtype, arguments.map_dtype)
    }
    watcher = _Terminal()
    try:
        found = runs.study(
            loaders[arguments.dtype],
            questions_of_command(arguments.questions, options),
            arguments.out,
            options=options_of(arguments, StudyOptions),
            map_model=None if len(loaders) == 1 else loaders[arguments.map_dtype],
            command=shlex.join(["stepflow-tl", *arguments.argv]),
            watcher=watcher,
            **asked,
        )
    finally:
        watcher.close()
    print(found.evaluation.table())
    if found.findings is not None:
        print("\nIn short:", *in_short(found.findings), sep="\n- ")
        print("\nwritten:", *map(str, found.written), sep="\n  ")
    elif found.stopped:
        say(f"stopped ({found.stopped}) in the stage: {found.stage}; run the same command again to go on")
    else:
        say("answers of other shards are missing: the shard that finishes last goes on to the maps")
    return 130 if found.stopped == "interrupted" else 1 if found.stopped else 0


class _Terminal:
    """Stages and progress on stderr."""

    def __init__(self) -> None:
        self.answers, self.maps = AnswersWatcher(), _MapsWatcher()

    def stage(self, words: str) -> None:
        self.close()
        say(f"== {words}")

    def close(self) -> None:
        self.answers.close()
        self.maps.close()


class _MapsWatcher(Watcher):
    """Progress of the maps of one stage after the other."""

    def begin(self, total: int, settings: Any, replicas: int) -> None:
        say(f"{total} traces, {settings.model_name} in {settings.dtype}")
        self.progress = Progress(total, replicas)
