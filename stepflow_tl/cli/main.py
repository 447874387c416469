"""The command `stepflow-tl`: arguments in, exit code out.

Each command registers itself (`add_<command>`), `demo` and `evaluate` here, because their modules are heavy.
Nothing heavy is imported until a command runs, so `--help` answers at once. An error that the package raises
on purpose is one line on stderr; anything else is a fault and keeps its traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stepflow_tl.cli.analyze import add_analyze
from stepflow_tl.cli.arguments import LAYOUT, add_weights, whole_number
from stepflow_tl.cli.report import add_report
from stepflow_tl.cli.summarize import add_summarize
from stepflow_tl.errors import StepflowError
from stepflow_tl.version import __version__

_DESCRIPTION = "Step-Saliency: where a reasoning model looks, step by step (arXiv 2604.06695)."
_EPILOG = """\
examples:
  stepflow-tl demo
  stepflow-tl analyze traces.jsonl --out results
  stepflow-tl analyze traces.jsonl --model Qwen/Qwen3-0.6B --out results --group-by is_correct
  stepflow-tl evaluate questions.jsonl --model Qwen/Qwen3-0.6B --grader maths
  stepflow-tl report results/q1.safetensors
  stepflow-tl summarize results --group-by is_correct
"""
_EVALUATE_EPILOG = """\
input: a file with one JSON object per line, or "testbed" for generated problems:
  question, answer   the text and the right answer
  id, difficulty     optional; accuracy is reported by difficulty

conditions: plain, bridge, momentum, StepFlow, "bridge control", "momentum control", "StepFlow control"; all
by default. A control does as much to the model as the condition it belongs to, in a random place.

exit code: 0 done; 2 the run could not start; 130 after Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: Arguments after the program's name; the process's own by default.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, not a crash.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help, the version or what is wrong
        return int(stop.code or 0)
    try:
        return arguments.run(arguments)
    except StepflowError as error:
        print(f"stepflow-tl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stepflow-tl: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "stepflow-tl", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=LAYOUT
    )
    parser.add_argument("--version", action="version", version=f"stepflow-tl {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="demo | analyze | evaluate | report | summarize", required=True
    )
    for add in (add_demo, add_analyze, add_evaluate, add_report, add_summarize):
        add(commands)
    return parser


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Add the command `demo`."""
    summary = "two traces of the embedded model, analysed and drawn, offline, in about a minute"
    demo = commands.add_parser("demo", help=summary, description=summary)
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the files (out/demo)")
    demo.add_argument(
        "--thinking-budget", type=whole_number, default=200, metavar="N", help="most thinking tokens (200)"
    )
    demo.add_argument(
        "--answer-budget", type=whole_number, default=60, metavar="N", help="most answer tokens (60)"
    )
    demo.set_defaults(run=_run_demo)


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add the command `evaluate`."""
    summary = "right answers with and without StepFlow, paired, against controls of equal size"
    command = commands.add_parser(
        "evaluate", help=summary, description=summary, epilog=_EVALUATE_EPILOG, formatter_class=LAYOUT
    )
    add = command.add_argument
    add("questions", metavar="QUESTIONS.jsonl", help='the questions, or "testbed"')
    add(
        "--model",
        metavar="NAME_OR_PATH",
        help="as for analyze, or a folder that scripts/train_testbed.py wrote",
    )
    add("--out", type=Path, metavar="FILE.json", help="write every score and difference")
    add("--conditions", nargs="+", metavar="NAME", help="which conditions (all)")
    add("--tau-max", type=float, default=0.15, help="highest floor of the bridge (0.15)")
    add("--alpha", type=float, default=0.06, help="size of the injections (0.06)")
    graders = (
        "maths needs math-verify; choice: options and labels; code: runs the answer against its test; "
        "steps is for the testbed: every step must be right (exact)"
    )
    add("--grader", choices=("exact", "maths", "steps", "choice", "code"), default="exact", help=graders)
    add(
        "--allow-code-execution",
        action="store_true",
        help="let --grader code execute what the model writes, in a sandbox",
    )
    add("--max-new-tokens", type=whole_number, default=1024, metavar="N", help="thinking and answer (1024)")
    add("--temperature", type=float, default=0.0, help="0 for greedy decoding (0)")
    add("--samples", type=whole_number, default=1, metavar="N", help="answers per question, sampled (1)")
    add("--batch-size", type=whole_number, default=16, metavar="N", help="answers written at once (16)")
    add("--batch-tokens", type=whole_number, default=1 << 16, metavar="N", help="and their tokens (65536)")
    add("--limit", type=whole_number, metavar="N", help="ask the first N questions; testbed: make N (400)")
    add("--seed", type=int, default=0, help="of problems, sampling and resampling (0)")
    add_weights(command)
    command.set_defaults(run=_run_evaluate)


def _run_demo(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.demo import DemoOptions, demo

    return demo(
        DemoOptions(
            arguments.out,
            thinking_budget=arguments.thinking_budget,
            answer_budget=arguments.answer_budget,
        )
    )


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.evaluate import EvaluateOptions, run_evaluate

    given = vars(arguments)
    given["conditions"] = tuple(given["conditions"]) if given["conditions"] else None
    return run_evaluate(
        EvaluateOptions(**{name: given[name] for name in EvaluateOptions.__dataclass_fields__})
    )
