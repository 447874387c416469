"""The options of StepFlow as the commands have them: `analyze --stepflow`, `evaluate`, `study`.

Declared once, like the options of a run (`runs.options`), from which their machinery comes. `FlowOptions`
checks nothing: `StepFlow` does, when `flow` makes one, and its words are what the user reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from stepflow_tl import stepflow
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs.options import OptionSet, option, parse_numbers, positive


@dataclass(frozen=True)
class FlowOptions(OptionSet):
    """Arguments of `StepFlow`, by the same names; on the command line `seed` is `--placebo-seed`.

    Attributes:
        tau_max: highest floor of the bridge's attention mass; 0 turns the bridge off (0.15)
        alpha: size of the injections; 0 turns momentum off (0.06)
        shallow: layers of the bridge, on the command line such as 0-6 (the bottom quarter)
        deep: layers of momentum, on the command line such as 21-27 (the top quarter)
        granularity: segment: from the question to thinking to the summary; step: from earlier steps (segment)
        window: momentum averages the last N tokens of the step before (all of it)
        heads: heads to act on, the same in every layer, on the command line such as 0-3,8 (all)
        max_bridge_share: highest part of the movable mass that the bridge may be raised to (0.9)
        boundaries: new steps that get momentum: response, all, within, thinking or summary (response)
        placebo: replace the bridge, momentum, or both by a control of equal size (none)
        seed: of the controls (0)
    """

    tau_max: float = option(0.15, type=float)
    alpha: float = option(0.06, type=float)
    shallow: Sequence[int] | None = option(None, type=parse_numbers, metavar="LIST")
    deep: Sequence[int] | None = option(None, type=parse_numbers, metavar="LIST")
    granularity: str = option("segment")
    window: int | None = option(None, type=positive, metavar="N")
    heads: Sequence[int] | None = option(None, type=parse_numbers, metavar="LIST")
    max_bridge_share: float = option(0.9, type=float)
    boundaries: str = option("response")
    placebo: str | None = option(None, metavar="HALF")
    seed: int = option(0, type=int, name="placebo_seed")

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `StepFlow`."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def flow(self) -> stepflow.StepFlow:
        """The repair that they describe.

        Raises:
            InputFileError: If a value has no meaning; the message is that of `StepFlow`.
        """
        try:
            return stepflow.StepFlow(**self.arguments)
        except ValueError as error:
            raise InputFileError(f"StepFlow cannot be made from these options: {error}") from error
