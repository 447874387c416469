"""A paired difference as cells of a table, the same wherever answers are compared."""

from __future__ import annotations

from stepflow_tl.results.tables import probability
from stepflow_tl.statistics.paired import PairedDifference

#: Over the cells, the difference's own heading apart.
AFTER_DIFFERENCE = ("95% low", "95% high", "gained", "lost", "p", "Holm p")


def difference_cells(found: PairedDifference, corrected: float) -> list[str]:
    """Difference, ends, gained, lost and p-values; where no answer differs there is no interval, and no p.

    Args:
        found: The difference.
        corrected: Its p-value after the correction.
    """
    counts = [str(found.gained), str(found.lost)]
    if not found.differs:
        return ["no answer", "differs", "", *counts, "-", "-"]
    ends = [f"{value:+.4f}" for value in (found.difference, found.low, found.high)]
    return [*ends, *counts, probability(found.p_value), probability(corrected)]
