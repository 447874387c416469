"""`stepflow-tl evaluate`: right answers with and without StepFlow, its halves and their controls.

The command line of `runs.evaluate`: here arguments go in, and progress, tables and the exit code come out.
What the options mean (`arguments_of`, `questions_of_command`, `model_name`), `stepflow-tl study` shares.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from stepflow_tl import runs
from stepflow_tl.cli.arguments import (
    DEFAULT_MODEL,
    TESTBEDS,
    add_command,
    add_options,
    add_weights,
    options_of,
)
from stepflow_tl.cli.console import Progress, Watcher, say
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs.answer_options import AnswerOptions
from stepflow_tl.runs.flow_options import FlowOptions

_STEPS = {6: (12, 16, 18, 20), 12: (8, 10, 12, 14)}  # of the problems, by the testbed model's layers
_DECIDED_HERE = ("placebo",)  # the conditions are StepFlow and its controls

_EPILOG = """\
input: a file with one JSON object per line, or "testbed" or "testbed-12" for generated problems, of one line
a step, or of several and with two steps to find in the end:
  question, answer   the text and the right answer; for --grader choice also choices and labels; for
                     --grader code prompt, entry_point and test instead
  id, difficulty     optional; accuracy is reported by difficulty

conditions: plain, bridge, momentum, StepFlow, "bridge control", "momentum control", "StepFlow control"; all
by default. A control does as much to the model as the condition it belongs to, in a random place.

output, in the folder --out: answers.jsonl, one line per answer, which `stepflow-tl analyze` reads as it is;
and at the end evaluation.txt and evaluation.json. With --out FILE.json that file alone, at the end.

A run that was killed goes on where it was when the same command is given again. Several runs may share
a folder:
  sbatch --array=0-7 ... stepflow-tl evaluate questions.jsonl --out answers --shard $SLURM_ARRAY_TASK_ID/8

exit code: 0 done; 1 the disk is full or workers died, the rest is done; 2 the run could not start; 130 after
Ctrl-C.
"""


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    summary = "right answers with and without StepFlow, paired, against controls of equal size"
    command = add_command(commands, "evaluate", summary, _run, _EPILOG)
    add = command.add_argument
    add("questions", metavar="QUESTIONS.jsonl", help='the questions, "testbed" or "testbed-12"')
    add(
        "--model",
        metavar="NAME_OR_PATH",
        help="as for analyze, or a folder that scripts/train_testbed.py wrote",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the answers and the tables")
    add_options(command, AnswerOptions)
    add_options(command, FlowOptions, without=_DECIDED_HERE)
    add_weights(command)


def _run(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.device import load
    from stepflow_tl.results.files import write_atomically

    options = options_of(arguments, AnswerOptions)
    flow = options_of(arguments, FlowOptions, without=_DECIDED_HERE)
    asked = arguments_of(options, flow)
    questions = questions_of_command(arguments.questions, options)
    out: Path | None = arguments.out
    file = out if out is not None and out.suffix == ".json" else None
    if file is not None and not file.parent.is_dir():
        raise InputFileError(f"--out {file}: there is no folder {file.parent}")
    model = partial(load, model_name(arguments), arguments.device, arguments.dtype, arguments.device_map)
    watcher = AnswersWatcher()
    try:
        found = runs.evaluate(model, questions, None if file else out, watcher=watcher, **asked)
    finally:
        watcher.close()
    print(found.table())
    written = [] if out is None else [out]
    if file is not None:
        write_atomically(file, (found.to_json() + "\n").encode())
    elif out is not None:
        written = [out / "evaluation.txt", out / "evaluation.json"]
    if written:
        print("\nwritten:", *map(str, written), sep="\n  ")
    return 130 if found.stopped == "interrupted" else 1 if found.stopped else 0


def model_name(arguments: argparse.Namespace) -> str:
    """The model of a command: the one it names, that of the testbed for its problems, or the default."""
    return arguments.model or (arguments.questions if arguments.questions in TESTBEDS else DEFAULT_MODEL)


def arguments_of(options: AnswerOptions, flow: FlowOptions) -> dict[str, Any]:
    """The arguments of `runs.evaluate` that the options mean, all but model, questions and folder.

    Args:
        options: Of the command.
        flow: The StepFlow around which the conditions are made.

    Raises:
        InputFileError: If they do not go together, or a condition is unknown.
    """
    from stepflow_tl.evaluation import Decoding, Prompting, standard_conditions

    try:
        known = standard_conditions(flow.flow())
        decoding = Decoding(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            n_samples=options.samples,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
        )
        prompting = Prompting(options.format, options.splitter, options.system, options.prompt)
    except InputFileError:
        raise
    except ValueError as error:
        raise InputFileError(f"these options do not go together: {error}") from error
    unknown = [name for name in options.conditions or () if name not in known]
    if unknown:
        raise InputFileError(f"--conditions: {', '.join(unknown)}; known are {', '.join(known)}")
    same = ("grader", "allow_code_execution", "shard", "engine", "replicas", "overwrite", "seed")
    return {
        "conditions": {name: known[name] for name in options.conditions or known},
        "decoding": decoding,
        "prompting": prompting,
        **{name: getattr(options, name) for name in same},
    }


def questions_of_command(source: str, options: AnswerOptions) -> list[Any]:
    """The questions that a command names: of a file, or made for the testbed.

    Args:
        source: A file of JSON lines, "testbed" or "testbed-12".
        options: Of the command.

    Raises:
        InputFileError: If they cannot be read, or the grader is not one for them.
    """
    from stepflow_tl.evaluation import questions_of, read_questions
    from stepflow_tl.testbed import ProblemSpec, make_problems
    from stepflow_tl.testbed.model import FORMS

    if source not in TESTBEDS:
        if options.grader == "steps":
            raise InputFileError(
                f"--grader steps: the right steps are known for {' and '.join(TESTBEDS)} alone, not for "
                f"{source}; expected --grader exact or maths"
            )
        return read_questions(source, options.grader)[: options.limit]
    if options.grader in ("choice", "code"):
        raise InputFileError(
            f"--grader {options.grader}: {source!r} has no such questions; give a file of them"
        )
    total = options.limit or 400
    n_layers = TESTBEDS[source]
    counts = [total // len(_STEPS[n_layers])] * len(_STEPS[n_layers])
    counts[0] += total - sum(counts)
    return questions_of(
        problem
        for n_steps, n in zip(_STEPS[n_layers], counts, strict=True)
        for problem in make_problems(ProblemSpec(n_steps=n_steps, **FORMS[n_layers]), n, seed=options.seed)
    )


class AnswersWatcher(Watcher):
    """Progress of the answers on stderr."""

    def begin(self, total: int, done: int, settings: Any, replicas: int) -> None:
        """The model is loaded."""
        there = f", {done} of them there already" if done else ""
        where = "" if replicas == 1 else f", {replicas} replicas"
        conditions = f"{len(settings.conditions)} conditions"
        say(f"{total} answers under {conditions}{there}, model {settings.model_name}{where}")
        self.progress = Progress(total, replicas, unit="answer", done=done)

    def advance(self, n_answers: int, n_tokens: int, seconds: float, tokens_left: float) -> None:
        """A batch is on the disk."""
        assert self.progress is not None
        self.progress.advance(n_tokens, seconds, tokens_left, n=n_answers)
