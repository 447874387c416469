"""How the commands read their arguments. Nothing heavy is imported, so `--help` answers at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, TypeVar

from stepflow_tl.runs.options import OptionSet, positive

DEFAULT_MODEL = "smollm2"
#: Names of the testbed models, and of the problems that each solves: its number of layers.
TESTBEDS = {"testbed": 6, "testbed-12": 12}
DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYOUT = argparse.RawDescriptionHelpFormatter  # keeps the examples as they are written

Options = TypeVar("Options", bound=OptionSet)


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A `type` for argparse: what `parse` says in its `ValueError` is what the user reads."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


whole_number = checked(positive)


@checked
def device_name(text: str) -> str:
    """The name of a device that torch knows; whether it is there is asked when the command runs."""
    if not re.fullmatch(r"cpu|mps|cuda(?::[0-9]+)?", text):
        raise ValueError(f"{text!r} is none of cpu, cuda, cuda:N, mps")
    return text


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command that `run` runs; returns its parser."""
    command = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=LAYOUT
    )
    command.set_defaults(run=run)
    return command


def add_options(
    parser: argparse._ActionsContainer, kind: type[OptionSet], *, without: Collection[str] = ()
) -> None:
    """Add every field of an options class as an argument, with its help, its default and its way of reading.

    Args:
        parser: The command's parser, or a group of its arguments.
        kind: Such as `RunOptions`.
        without: Fields that the command decides for itself.
    """
    helps, one_of = kind.helps(), None
    for each in fields(kind):
        reading = dict(each.metadata)
        if reading.pop("hidden", False) or each.name in without:
            continue
        add = parser.add_argument
        if reading.pop("exclusive", False):
            one_of = one_of or parser.add_mutually_exclusive_group()
            add = one_of.add_argument
        name = reading.pop("name", each.name)
        if isinstance(each.default, bool):
            reading["action"] = "store_true"
        elif "type" in reading:
            reading["type"] = checked(reading["type"])
        add(f"--{name.replace('_', '-')}", default=each.default, help=helps.get(each.name), **reading)


def options_of(
    arguments: argparse.Namespace, kind: type[Options], *, without: Collection[str] = ()
) -> Options:
    """The options that `add_options` read, `without` the same fields."""
    given = vars(arguments)
    names = {
        each.name: each.metadata.get("name", each.name)
        for each in fields(kind)
        if not each.metadata.get("hidden")
    }
    return kind(**{own: given[name] for own, name in names.items() if name in given and own not in without})


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Where a model's weights go, and in which precision: what `device.load` takes after the name."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu (default), cuda, cuda:1, mps")
    parser.add_argument(
        "--device-map", metavar="MAP", help="auto spreads a model larger than one GPU over all"
    )
