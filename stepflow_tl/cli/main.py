"""The command `stepflow-tl`: arguments in, exit code out.

Nothing heavy is imported until a command runs, so `--help` answers at once. An error that the package raises
on purpose is one line on stderr; anything else is a fault and keeps its traceback.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from stepflow_tl.errors import StepflowError
from stepflow_tl.version import __version__

DEFAULT_MODEL = "smollm2"

_LAYOUT = argparse.RawDescriptionHelpFormatter  # keeps the examples as they are written
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
_ANALYZE_EPILOG = """\
input: a file with one JSON object a line, a Parquet file or a folder of them, or a data set that Hugging Face
`datasets` saved on disk (Parquet and data sets need the extra "datasets"), with the fields
  id          name of the result file (optional)
  question, thinking, summary
              the parts of the trace (summary may be missing)
  text        or, in place of the parts, the full transcript with its markers
  any other   left alone, unless --group-by or --pair-by names it

example line:
  {"id": "q1", "question": "2+2*3?", "thinking": "2*3 = 6.\\n\\n2+6 = 8.", "summary": "8", "is_correct": true}

output, in the folder --out: one .safetensors a trace (StepSaliency.load reads it), manifest.jsonl (what is
done, what failed and why), summary.csv, and with --group-by comparison.txt and comparison.json. With --causal
also knockout/ with one .safetensors a trace (StepKnockout.load reads it), agreement.csv and agreement.json.

A run that was killed goes on where it was when the same command is given again. Several runs may share
a folder:
  sbatch --array=0-7 ... stepflow-tl analyze traces.jsonl --out results --shard $SLURM_ARRAY_TASK_ID/8

exit code: 0 every line has a result; 1 something failed or the disk is full, the rest is done; 2 the run
could not start; 130 after Ctrl-C.
"""
_EVALUATE_EPILOG = """\
input: a file with one JSON object a line, or "testbed" for generated problems:
  question, answer   the text and the right answer
  id, difficulty     optional; accuracy is reported by difficulty

conditions: plain, bridge, momentum, StepFlow, "bridge control", "momentum control", "StepFlow control"; all
by default. A control does as much to the model as the condition it belongs to, in a random place.

exit code: 0 done; 2 the run could not start; 130 after Ctrl-C.
"""
_SUMMARIZE_EPILOG = """\
input: a folder that `analyze --out` wrote (its manifests say what is in it), or any folder of
StepSaliency.save files of one analysis.

output: band means with intervals, what is missing and why, and the comparison of two groups where the traces
have groups; and a Parquet table, one row a trace and layer: id, group, pair, n_tokens, numbers of steps,
layer, every metric, model, objective, dtype, backend.

exit code: 0 done; 1 a result is missing or damaged, or the comparison asked for cannot be made, the rest is
done; 2 it could not start.
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
        "stepflow-tl", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_LAYOUT
    )
    parser.add_argument("--version", action="version", version=f"stepflow-tl {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="demo | analyze | evaluate | report | summarize", required=True
    )
    _add_demo(commands)
    _add_analyze(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_summarize(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    summary = "two traces of the embedded model, analysed and drawn, offline, in about a minute"
    demo = commands.add_parser("demo", help=summary, description=summary)
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the files (out/demo)")
    demo.add_argument(
        "--thinking-budget", type=_positive, default=200, metavar="N", help="most thinking tokens (200)"
    )
    demo.add_argument(
        "--answer-budget", type=_positive, default=60, metavar="N", help="most answer tokens (60)"
    )
    demo.set_defaults(run=_run_demo)


def _add_analyze(commands: argparse._SubParsersAction) -> None:
    summary = "Step-Saliency of every trace of a data set"
    analyze = commands.add_parser(
        "analyze", help=summary, description=summary, epilog=_ANALYZE_EPILOG, formatter_class=_LAYOUT
    )
    add = analyze.add_argument
    add("traces", type=Path, metavar="TRACES", help="the traces: JSON lines, Parquet, or a saved data set")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME_OR_PATH",
        help=f"{DEFAULT_MODEL} (the embedded model, the default), a Hugging Face name, or a model folder",
    )
    add(
        "--objective",
        type=_objective,
        default="per_token",
        help="per_token (default), response, thinking, summary, or a step such as S1",
    )
    add("--layers", type=_layers, metavar="LIST", help="layers to keep, such as 0-6,23-29 (all)")
    add(
        "--splitter",
        choices=("paragraph", "line", "sentence", "whole"),
        default="paragraph",
        help="(paragraph)",
    )
    add("--format", default="auto", help="reasoning format (auto: read from the model's chat template)")
    add(
        "--group-by",
        metavar="FIELD",
        help="compare the traces where this field is true with those where it is false",
    )
    pairing = analyze.add_mutually_exclusive_group()
    pairing.add_argument(
        "--pair-by",
        metavar="FIELD",
        help="pair the two groups by this field (problem_id where the records have it)",
    )
    pairing.add_argument("--unpaired", action="store_true", help="compare without pairing")
    add("--overwrite", action="store_true", help="analyse again where a result is there already")
    add("--retry-failed", action="store_true", help="try again what failed in an earlier run")
    add("--limit", type=_positive, metavar="N", help="read the first N lines only")
    add("--shard", metavar="I/N", help="take part I of N, I from 0; N runs may share the folder")
    add("--engine", choices=("local", "ray"), default="local", help="this process (local), or a Ray cluster")
    add("--replicas", type=_positive, metavar="N", help="models at once, for ray (one a GPU, or one)")
    add("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32", help="(float32)")
    add("--device", type=_device, default="cpu", help="cpu (default), cuda, cuda:1, mps")
    add(
        "--device-map",
        metavar="MAP",
        help="auto spreads a model larger than one GPU over all",
    )
    add(
        "--causal",
        action="store_true",
        help="also cut every pair of steps, measure the harm, and say how well the maps agree",
    )
    add("--figures", action="store_true", help="draw step maps and profiles beside each result")
    analyze.set_defaults(run=_run_analyze)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    summary = "right answers with and without StepFlow, paired, against controls of equal size"
    command = commands.add_parser(
        "evaluate", help=summary, description=summary, epilog=_EVALUATE_EPILOG, formatter_class=_LAYOUT
    )
    add = command.add_argument
    add("questions", metavar="QUESTIONS.jsonl", help='the questions, or "testbed"')
    add(
        "--model",
        metavar="NAME_OR_PATH",
        help="as for analyze, or a folder of stepflow_tl.testbed.train",
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
    add("--max-new-tokens", type=_positive, default=1024, metavar="N", help="thinking and answer (1024)")
    add("--temperature", type=float, default=0.0, help="0 for greedy decoding (0)")
    add("--samples", type=_positive, default=1, metavar="N", help="answers a question, sampled (1)")
    add("--batch-size", type=_positive, default=16, metavar="N", help="answers written at once (16)")
    add("--batch-tokens", type=_positive, default=1 << 16, metavar="N", help="and their tokens (65536)")
    add("--limit", type=_positive, metavar="N", help="ask the first N questions; testbed: make N (400)")
    add("--seed", type=int, default=0, help="of problems, sampling and resampling (0)")
    add("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32", help="(float32)")
    add("--device", type=_device, default="cpu", help="cpu (default), cuda, cuda:1, mps")
    command.set_defaults(run=_run_evaluate)


def _add_report(commands: argparse._SubParsersAction) -> None:
    summary = "one interactive HTML page of one result: maps, text, profiles; opens without any network"
    report = commands.add_parser("report", help=summary, description=summary)
    add = report.add_argument
    add("result", type=Path, metavar="RESULT.safetensors", help="a result of analyze or StepSaliency.save")
    add("--out", type=Path, metavar="FILE.html", help="the page (RESULT.report.html, beside the result)")
    add("--pooling", choices=("mean", "causal_mean", "sum"), default="mean", help="of token saliency (mean)")
    report.set_defaults(run=_run_report)


def _add_summarize(commands: argparse._SubParsersAction) -> None:
    summary = "the numbers of a whole run: band means, the comparison of two groups, one Parquet table"
    command = commands.add_parser(
        "summarize", help=summary, description=summary, epilog=_SUMMARIZE_EPILOG, formatter_class=_LAYOUT
    )
    add = command.add_argument
    add("folder", type=Path, metavar="DIR", help="the run")
    add("--out", type=Path, metavar="FILE.parquet", help="the table (DIR/layers.parquet)")
    add("--group-by", metavar="FIELD", help="what the groups are called, and the field read from --labels")
    pairing = command.add_mutually_exclusive_group()
    pairing.add_argument("--pair-by", metavar="FIELD", help="the same for pairs (problem_id)")
    pairing.add_argument("--unpaired", action="store_true", help="compare without pairing")
    add("--labels", type=Path, metavar="TRACES.jsonl", help="take groups and pairs from here, by id")
    add("--verify", action="store_true", help="compare every file with the SHA-256 in its manifest")
    command.set_defaults(run=_run_summarize)


def _run_demo(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.demo import DemoOptions, demo

    return demo(
        DemoOptions(
            arguments.out,
            thinking_budget=arguments.thinking_budget,
            answer_budget=arguments.answer_budget,
        )
    )


def _run_analyze(arguments: argparse.Namespace) -> int:
    if arguments.group_by is None and (arguments.pair_by is not None or arguments.unpaired):
        print("stepflow-tl: error: --pair-by and --unpaired go with --group-by FIELD", file=sys.stderr)
        return 2
    from stepflow_tl.cli.analyze import AnalyzeOptions, analyze

    given = vars(arguments)
    return analyze(AnalyzeOptions(**{name: given[name] for name in AnalyzeOptions.__dataclass_fields__}))


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.evaluate import EvaluateOptions, run_evaluate

    given = vars(arguments)
    given["conditions"] = tuple(given["conditions"]) if given["conditions"] else None
    return run_evaluate(
        EvaluateOptions(**{name: given[name] for name in EvaluateOptions.__dataclass_fields__})
    )


def _run_report(arguments: argparse.Namespace) -> int:
    from stepflow_tl.saliency.result import StepSaliency

    saliency = StepSaliency.load(arguments.result)
    out = arguments.out or arguments.result.with_suffix(".report.html")
    print(saliency.report(out, pooling=arguments.pooling))
    return 0


def _run_summarize(arguments: argparse.Namespace) -> int:
    if arguments.labels is not None and arguments.group_by is None:
        print("stepflow-tl: error: --labels goes with --group-by FIELD", file=sys.stderr)
        return 2
    from stepflow_tl.cli.summarize import SummarizeOptions, run_summarize

    given = vars(arguments)
    return run_summarize(
        SummarizeOptions(**{name: given[name] for name in SummarizeOptions.__dataclass_fields__})
    )


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _layers(text: str) -> tuple[int, ...]:
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,4})(?:\s*-\s*([0-9]{1,4}))?\s*", part)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r}: expected layers and ranges such as 0-6,23-29")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} runs backwards: write {last}-{first}")
        layers += range(first, last + 1)
    if len(set(layers)) != len(layers):
        raise argparse.ArgumentTypeError(f"{text!r} names a layer twice")
    return tuple(layers)


def _objective(text: str) -> str:
    if text in ("per_token", "response", "thinking", "summary") or re.fullmatch(r"[QTS][0-9]*", text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is none of per_token, response, thinking, summary, nor a step such as T3 or S1"
    )


def _device(text: str) -> str:
    if re.fullmatch(r"cpu|mps|cuda(?::[0-9]+)?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:N, mps")
