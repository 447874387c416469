"""`stepflow-tl report`: one interactive HTML page of one result."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepflow_tl.cli.arguments import add_command


def add_report(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    summary = "one interactive HTML page of one result: maps, text, profiles; opens without any network"
    add = add_command(commands, "report", summary, _run).add_argument
    add("result", type=Path, metavar="RESULT.safetensors", help="a result of analyze or StepSaliency.save")
    add("--out", type=Path, metavar="FILE.html", help="the page (RESULT.report.html, beside the result)")
    add("--pooling", choices=("mean", "causal_mean", "sum"), default="mean", help="of token saliency (mean)")


def _run(arguments: argparse.Namespace) -> int:
    from stepflow_tl.rendering import report
    from stepflow_tl.saliency.result import StepSaliency

    saliency = StepSaliency.load(arguments.result)
    out = arguments.out or arguments.result.with_suffix(".report.html")
    print(report(saliency, out, pooling=arguments.pooling))
    return 0
