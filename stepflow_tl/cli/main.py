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
from stepflow_tl.cli.arguments import LAYOUT, add_command, whole_number
from stepflow_tl.cli.compare_runs import add_compare_runs
from stepflow_tl.cli.evaluate import add_evaluate
from stepflow_tl.cli.power import add_power
from stepflow_tl.cli.report import add_report
from stepflow_tl.cli.study import add_study
from stepflow_tl.cli.summarize import add_summarize
from stepflow_tl.errors import StepflowError
from stepflow_tl.version import __version__

_DESCRIPTION = "Step-Saliency: where a reasoning model looks, step by step (arXiv 2604.06695)."
_EPILOG = """\
examples:
  stepflow-tl demo
  stepflow-tl analyze traces.jsonl --out results
  stepflow-tl analyze traces.jsonl --model Qwen/Qwen3-0.6B --out results --group-by is_correct
  stepflow-tl evaluate questions.jsonl --model Qwen/Qwen3-0.6B --grader maths --out answers
  stepflow-tl study questions.jsonl --model model.gguf --grader maths --out study
  stepflow-tl report results/q1.safetensors
  stepflow-tl summarize results --group-by is_correct
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
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
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
        title="commands",
        metavar="demo | analyze | evaluate | study | report | summarize | compare-runs | power",
        required=True,
    )
    for add in (
        add_demo,
        add_analyze,
        add_evaluate,
        add_study,
        add_report,
        add_summarize,
        add_compare_runs,
        add_power,
    ):
        add(commands)
    return parser


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Add the command `demo`."""
    summary = "two traces of the embedded model, analysed and drawn, offline, in about a minute"
    demo = add_command(commands, "demo", summary, _run_demo)
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the files (out/demo)")
    demo.add_argument(
        "--thinking-budget", type=whole_number, default=200, metavar="N", help="most thinking tokens (200)"
    )
    demo.add_argument(
        "--answer-budget", type=whole_number, default=60, metavar="N", help="most answer tokens (60)"
    )


def _run_demo(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.demo import DemoOptions, demo

    return demo(DemoOptions(arguments.out, arguments.thinking_budget, arguments.answer_budget))
