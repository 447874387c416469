"""`stepflow-tl power`: what a paired comparison of n questions can show, and how long it takes."""

from __future__ import annotations

import argparse

from stepflow_tl.cli.arguments import add_command, checked, whole_number
from stepflow_tl.errors import InputFileError

_EPILOG = """\
One greedy answer per question under two conditions, McNemar's exact test. Without --discordant, answers of
the two conditions are taken as independent, which is an upper guess: --discordant from a first run of your
own (gained + lost, over n) gives a better one.

Several samples of a question are averaged. They narrow the interval as far as chance within a question makes
it wide, at most by their square root; what a repair does to one question more than to another stays.

Hours: n x samples x conditions x tokens / (tokens per second and GPU x GPUs x 3600), from YOUR measured rate.

example:
  stepflow-tl power --n 198 --baseline 0.49 --difference 0.05 --tokens 9000 --tokens-per-second 700 --gpus 8
"""


@checked
def share(text: str) -> float:
    """A number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise ValueError(f"{text} is not a number between 0 and 1")
    return value


def add_power(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    summary = "how many questions a paired comparison needs, and the hours at your measured rate"
    command = add_command(commands, "power", summary, _run, _EPILOG)
    add = command.add_argument
    add("--n", type=whole_number, required=True, metavar="N", help="questions")
    add("--baseline", type=share, required=True, metavar="SHARE", help="right answers of the plain model")
    add("--difference", type=float, metavar="D", help="a difference of interest, such as 0.05")
    add("--discordant", type=share, metavar="SHARE", help="questions that only one condition gets right")
    add("--level", type=share, default=0.05, help="of the test (0.05)")
    add("--samples", type=whole_number, metavar="N", help="answers per question, averaged (1)")
    add("--half-width", type=float, metavar="W", help="wanted of the interval; gives the samples it needs")
    add(
        "--conditions",
        type=whole_number,
        default=3,
        metavar="N",
        help="for the hours (3: plain, StepFlow, control)",
    )
    add("--tokens", type=whole_number, metavar="N", help="mean tokens of an answer")
    add("--tokens-per-second", type=float, metavar="R", help="your measured rate of one GPU, with its batch")
    add("--gpus", type=whole_number, default=1, metavar="N", help="(1)")


def _run(arguments: argparse.Namespace) -> int:
    from stepflow_tl.statistics import power

    n, right = arguments.n, arguments.baseline
    if (arguments.tokens is None) != (arguments.tokens_per_second is None):
        raise InputFileError("--tokens and --tokens-per-second go together: hours need both")
    if arguments.tokens_per_second is not None and not arguments.tokens_per_second > 0:
        raise InputFileError(
            f"--tokens-per-second is {arguments.tokens_per_second}: expected a positive rate"
        )
    discordant = arguments.discordant or 2 * right * (1 - right)
    source = "given" if arguments.discordant else "answers taken as independent"
    print(
        f"{n} questions, {right:.3f} right, {discordant:.3f} discordant ({source}), level {arguments.level}"
    )
    print(f"interval of the difference: about +-{power.half_width(n, discordant):.4f} (95%)")
    samples = arguments.samples or 1
    if arguments.half_width is not None:
        needed = power.samples_needed(n, discordant, arguments.half_width)
        samples = arguments.samples or needed
        print(f"samples per question for +-{arguments.half_width}: at least {needed}")
    if samples > 1:
        width = power.half_width(n * samples, discordant)
        print(f"with {samples} samples per question: at least +-{width:.4f}")
    smallest = power.detectable_difference(n, discordant, alpha=arguments.level)
    found = "none: too few questions" if smallest is None else f"{smallest:.4f}"
    print(f"smallest difference found with power 0.8: {found}")
    if arguments.difference is not None:
        found = power.mcnemar_power(n, discordant, arguments.difference, arguments.level)
        print(f"power for a difference of {arguments.difference}: {found:.3f}")
    if arguments.tokens is not None:
        total = n * samples * arguments.conditions * arguments.tokens
        hours = total / (arguments.tokens_per_second * arguments.gpus * 3600)
        print(
            f"hours: {hours:.1f} at {arguments.tokens_per_second} tokens/s on each of {arguments.gpus} GPUs"
        )
    return 0
