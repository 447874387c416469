"""The options of a run and of its summary, each declared once.

A field is an option of `analyze_dataset` or `summarize` under its own name, and `--name` on the command line.
Its line under "Attributes" is its help in both places; its metadata say how the command line reads it. The
objects are plain data, so that they travel to other processes as they are.

Nothing heavy is imported here: the command line is built from this module before anything is loaded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from stepflow_tl import stepflow as repair
from stepflow_tl.errors import InputFileError

Options = TypeVar("Options", bound="OptionSet")

ENGINES = ("local", "ray")
PER_TOKEN = ("per_token", "log_odds")  # objectives with a loss for each row
SPLITTERS = ("paragraph", "line", "sentence", "whole")
CAUSAL = ("all", "screened")


@dataclass(frozen=True)
class Shard:
    """One part of an input that several runs share, in the same folder.

    Attributes:
        index: Which part, from 0, as in SLURM's array 0-(n-1).
        count: How many parts there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a part that does not exist."""
        if not 0 <= self.index < self.count:
            raise InputFileError(
                f"shard {self.index}/{self.count} does not exist: of n shards the first is 0/n, the last "
                "(n-1)/n"
            )

    @classmethod
    def of(cls, asked: str | Shard | None) -> Shard:
        """The part that is asked for: as it is written on the command line, or all for None.

        Args:
            asked: Such as "2/8".

        Raises:
            InputFileError: If it does not name a part.
        """
        if asked is None or isinstance(asked, Shard):
            return asked or cls()
        return cls.parse(asked)

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `text` such as "2/8".

        Raises:
            InputFileError: If it does not name a part.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found:
            raise InputFileError(f"{text!r} is not a shard: expected i/n, such as 0/8 for the first of eight")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"{self.index}/{self.count}"

    @property
    def suffix(self) -> str:
        """What tells its files from those of the other shards: "-2-of-8", empty for a run that is not cut."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


def positive(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        ValueError: If the text is anything else.
    """
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise ValueError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Layers or heads, written as numbers and ranges.

    Raises:
        ValueError: If the text is anything else, a range runs backwards, or a number is named twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,4})(?:\s*-\s*([0-9]{1,4}))?\s*", part)
        if not found:
            raise ValueError(f"{text!r}: expected numbers and ranges such as 0-6,23-29")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"{part.strip()!r} runs backwards: write {last}-{first}")
        numbers += range(first, last + 1)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{text!r} names a number twice")
    return tuple(numbers)


def parse_objective(text: str) -> str:
    """The name of an objective.

    Raises:
        ValueError: If it is not one.
    """
    names = (*PER_TOKEN, "response", "thinking", "summary")
    if text in names or re.fullmatch(r"[QTS][0-9]*", text):
        return text
    raise ValueError(f"{text!r} is none of {', '.join(names)}, nor a step such as T3 or S1")


def parse_match(text: str) -> tuple[str, ...]:
    """What matched traces must be alike in.

    Raises:
        ValueError: If it is not steps, tokens, or both.
    """
    found = tuple(part.strip() for part in text.split(","))
    if set(found) - {"steps", "tokens"} or len(set(found)) != len(found):
        raise ValueError(f"{text!r} is none of steps, tokens, steps,tokens")
    return found


def parse_where(text: str) -> str:
    """A condition on a field, FIELD=VALUE.

    Raises:
        ValueError: If it is not one.
    """
    if not re.match("[^=]+=", text):
        raise ValueError(f"{text!r} is not FIELD=VALUE, such as condition=plain or sample=0")
    return text


def option(default: Any, **reading: Any) -> Any:
    """A field with the arguments of `add_argument` that its type does not tell.

    Besides those: of all options marked `exclusive`, the command line takes one at most; a `hidden` one is
    not on it; `name` is what it is called there, where that is not the field's own name.
    """
    return field(default=default, metadata=reading)


@dataclass(frozen=True)
class OptionSet:
    """Fields that are options of a function and of a command; see `option`."""

    @classmethod
    def of(cls: type[Options], function: str, given: Mapping[str, Any]) -> Options:
        """The options that a function was called with.

        Args:
            function: Its name, for the message.
            given: Its keyword arguments.

        Raises:
            TypeError: If one is not an option.
        """
        known = [each.name for each in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(
                f"{function} has no option {', '.join(map(repr, unknown))}: expected {', '.join(known)}"
            )
        return cls(**given)

    @classmethod
    def helps(cls) -> dict[str, str]:
        """The help text of each option, from the docstrings; empty under `python -OO`."""
        text = "\n".join(inspect.cleandoc(each.__doc__ or "") for each in reversed(cls.__mro__[:-1]))
        found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE)
        return {name: re.sub(r"\s+", " ", words) for name, words in found}


@dataclass(frozen=True)
class GroupOptions(OptionSet):
    """Which two groups of traces are compared.

    Attributes:
        group_by: compare the traces where this field is true with those where it is false
        pair_by: pair the two groups by this field (problem_id where the records have it)
        unpaired: compare without pairing
        match_on: also compare pairs of traces that are alike in length: steps, tokens, or steps,tokens
    """

    group_by: str | None = option(None, metavar="FIELD")
    pair_by: str | None = option(None, metavar="FIELD", exclusive=True)
    unpaired: bool = option(False, exclusive=True)
    match_on: Sequence[str] | None = option(None, type=parse_match, name="match", metavar="LIST")


@dataclass(frozen=True)
class RunOptions(GroupOptions):
    """Options of `analyze_dataset` and `stepflow-tl analyze`; `GroupOptions` are among them.

    Attributes:
        objective: per_token (default), log_odds, response, thinking, summary, or a step such as S1
        layers: layers to keep, on the command line such as 0-6,23-29 (all)
        splitter: how thinking and summary are cut into steps (as an answer file says, else paragraph)
        format: reasoning format, or FILE.json of your own (auto: as an answer file says, else the model's)
        where: only traces whose field has this value; several of a field: any of them; may be repeated
        stepflow: map the repaired flow: the analysis runs under this `StepFlow`
        overwrite: analyse again where a result is there already
        retry_failed: try again what failed in an earlier run
        limit: the first N traces only
        shard: take part I of N, I from 0; N runs may share the folder
        engine: this process (local), or the replicas of a Ray cluster, which is started here if there is none
        replicas: models at once, for ray (one per GPU, or one)
        causal: also cut pairs of steps, measure the harm, and say how well the maps agree: all pairs (the
            default of the bare option), or screened: of each step the most salient ones alone, others in
            groups
        figures: draw step maps and profiles beside each result
    """

    objective: str = option("per_token", type=parse_objective)
    layers: Sequence[int] | None = option(None, type=parse_numbers, metavar="LIST")
    splitter: str | None = option(None, choices=SPLITTERS)
    format: str = option("auto")
    where: Sequence[str] | None = option(None, type=parse_where, action="append", metavar="FIELD=VALUE")
    stepflow: repair.StepFlow | None = option(None, hidden=True)
    overwrite: bool = option(False)
    retry_failed: bool = option(False)
    limit: int | None = option(None, type=positive, metavar="N")
    shard: str | Shard | None = option(None, metavar="I/N")
    engine: str = option("local", choices=ENGINES)
    replicas: int | None = option(None, type=positive, metavar="N")
    causal: str | bool | None = option(None, nargs="?", const="all", choices=CAUSAL)
    figures: bool = option(False)

    def __post_init__(self) -> None:
        """Layers and conditions as tuples; refuse a condition, an engine or cuts that do not exist."""
        for name in ("layers", "where"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for condition in self.where or ():
            parse_where(condition)
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}: expected {' or '.join(map(repr, ENGINES))}")
        if isinstance(self.causal, bool):
            object.__setattr__(self, "causal", "all" if self.causal else None)
        if self.causal not in (None, *CAUSAL):
            raise ValueError(
                f"causal is {self.causal!r}: expected True or 'all' for all pairs of steps, or 'screened'"
            )

    def for_source(self, settings: Mapping[str, Any]) -> RunOptions:
        """The same options, with format and splitter as the source says where nobody else does.

        Args:
            settings: What a file of answers says of its run.
        """
        format, splitter = settings.get("format"), settings.get("splitter")
        return replace(
            self,
            format=format if self.format == "auto" and isinstance(format, str) else self.format,
            splitter=self.splitter or (splitter if splitter in SPLITTERS else SPLITTERS[0]),
        )

    @property
    def part(self) -> Shard:
        """The part of the input that is taken; all of it by default.

        Raises:
            InputFileError: If the shard does not exist.
        """
        return Shard.of(self.shard)


@dataclass(frozen=True)
class SummaryOptions(GroupOptions):
    """Options of `summarize` and `stepflow-tl summarize`; `GroupOptions` are among them.

    The last four are not on the command line.

    Attributes:
        verify: compare every file with the SHA-256 in its manifest
        confidence: coverage of the intervals
        n_bootstrap: bootstrap resamples
        n_permutations: permutations of the comparison
        seed: of all resampling
    """

    verify: bool = option(False)
    confidence: float = option(0.95, hidden=True)
    n_bootstrap: int = option(4000, hidden=True)
    n_permutations: int = option(9999, hidden=True)
    seed: int = option(0, hidden=True)

    def __post_init__(self) -> None:
        """Refuse a level or a count out of range."""
        if not 0 < self.confidence < 1 or self.n_bootstrap < 1 or self.n_permutations < 1:
            raise ValueError(
                f"confidence is {self.confidence}, n_bootstrap {self.n_bootstrap}, n_permutations "
                f"{self.n_permutations}: expected a level between 0 and 1, and at least one of each"
            )
