"""Where things go on a step map, and how its values become visible: pure arithmetic, no plotting library.

Places: segment runs and boundaries, thinned tick labels, a selection over depth, lines of text. Positions are
step indices: step i's cell covers [i - 0.5, i + 0.5].

Scales bring a step map into [0, 1]. Raw saliency spans several decades, and depth, row and pooling all move
its level. Each scale answers one question:

- `row_shares`: of what step i draws on, which part comes from step j? Each row sums to 1, as in `diagnose`.
- `share_decades`: the same on a logarithmic scale, so that a share of 1 % can still be seen.
- `row_max`: the same picture with every row stretched to its own strongest source.
- `log_decades`: how strong is the pair compared with the strongest pair of all the maps shown together?
- `signed_extent`, for signed scores, into [-1, 1]: the same on a linear scale, with its sign.

All keep zeros at zero and never return NaN: a row without any mass stays zero.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import TraceError
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.saliency.scores import TITLES, Score
from stepflow_tl.trace import Step
from stepflow_tl.trace.steps import Segment

StepMaps = Float[Tensor, "*map query_step key_step"]

POINTS_PER_INCH = 72.0
DECADES = 3
PER_PAIR: dict[Pooling, str] = {
    "mean": " per token pair",
    "causal_mean": " per causal token pair",
    "sum": "",
}
SEGMENT_NAMES = {Segment.QUESTION: "Question", Segment.THINKING: "Thinking", Segment.SUMMARY: "Summary"}


@dataclass(frozen=True)
class SegmentRun:
    """Neighbouring steps of one segment.

    Attributes:
        segment: The segment all of them belong to.
        start: First step index.
        end: One past the last step index.
    """

    segment: Segment
    start: int
    end: int

    @property
    def centre(self) -> float:
        """Middle of the run's cells, in step coordinates."""
        return (self.start + self.end - 1) / 2


def segment_runs(steps: Sequence[Step]) -> list[SegmentRun]:
    """Group neighbouring steps of the same segment, in order."""
    runs: list[SegmentRun] = []
    for index, step in enumerate(steps):
        if runs and runs[-1].segment == step.segment:
            runs[-1] = SegmentRun(step.segment, runs[-1].start, index + 1)
        else:
            runs.append(SegmentRun(step.segment, index, index + 1))
    return runs


def boundaries(runs: Sequence[SegmentRun]) -> list[float]:
    """Where one segment ends and the next starts, in step coordinates."""
    return [run.start - 0.5 for run in runs[1:]]


def thin_ticks(runs: Sequence[SegmentRun], min_gap: float) -> list[int]:
    """Steps whose labels fit when two labels need `min_gap` steps between them.

    1. The first step of each segment comes first in line, then round numbers (T5, T10, ... or T10, T20, ...).
    2. A step is taken only where it stays `min_gap` away from every step taken before it.
    """
    if min_gap <= 1:
        return [index for run in runs for index in range(run.start, run.end)]
    stride = next((s for s in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if s >= min_gap), int(min_gap) + 1)
    firsts = [run.start for run in runs]
    round_numbers = [i for run in runs for i in range(run.start + stride - 1, run.end, stride)]
    taken: list[int] = []
    for index in [*firsts, *round_numbers]:
        if all(abs(index - other) >= min_gap for other in taken):
            taken.append(index)
    return sorted(taken)


def margin_names(runs: Sequence[SegmentRun], char_width: float, n_steps: int) -> list[tuple[str, float]]:
    """A name for each run and where its middle goes, so that neighbours never overlap.

    1. A run long enough for its whole name carries it, in its middle; another carries the initial.
    2. Names too close to each other are pushed apart, rightwards first, then back inside the axis.

    `char_width` is in steps; `n_steps` is the length of the axis.
    """
    names = [SEGMENT_NAMES[run.segment] for run in runs]
    names = [
        name if len(name) * char_width <= run.end - run.start else name[0]
        for name, run in zip(names, runs, strict=True)
    ]
    widths = [len(name) * char_width for name in names]
    middles = [run.centre for run in runs]
    edge = -0.5
    for i, width in enumerate(widths):
        middles[i] = max(middles[i], edge + width / 2)
        edge = middles[i] + width / 2
    edge = n_steps - 0.5
    for i in reversed(range(len(widths))):
        middles[i] = min(middles[i], edge - widths[i] / 2)
        edge = middles[i] - widths[i] / 2
    return list(zip(names, middles, strict=True))


def require_steps(saliency: StepSaliency) -> int:
    """The number of steps; a trace that has none is refused."""
    if not saliency.labels:
        raise TraceError(
            "this trace has no steps, so there is nothing to report or draw: give it a question or thinking"
        )
    return len(saliency.labels)


def evenly_over_depth(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Pick `count` (two or more) of the layers, evenly spaced in their order, first and last included.

    Of 30 layers, six are 0, 6, 12, 17, 23, 29. All are returned when there are no more than `count`.
    """
    if len(layers) <= count:
        return tuple(layers)
    return tuple(layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count))


def layer_span(layers: Sequence[int]) -> str:
    """Layers in words: "layer 5", "layers 0, 3", "layers 0 to 6"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + ", ".join(map(str, layers))


def saliency_words(pooling: Pooling, score: Score = "saliency") -> str:
    """What a pooled map is; `PER_PAIR` continues its unit."""
    noun = "saliency" if score == "saliency" else TITLES[score].lower()
    return f"{'summed' if pooling == 'sum' else 'mean'} {noun}"


def wrap_to_width(text: str, font_size: float, width: float) -> list[str]:
    """Break a text into lines that fit a width in inches; a character is 0.58 font sizes wide, rounded up."""
    return textwrap.wrap(text, max(12, int(width * POINTS_PER_INCH / (0.58 * font_size))))


def row_shares(maps: StepMaps) -> StepMaps:
    """Divide each row by its sum; rows without mass stay 0."""
    return _ratio(maps, maps.sum(dim=-1, keepdim=True))


def row_max(maps: StepMaps) -> StepMaps:
    """Divide each row by its largest entry; rows without mass stay 0."""
    return _ratio(maps, maps.amax(dim=-1, keepdim=True)) if maps.numel() else maps.clone()


def share_decades(maps: StepMaps) -> StepMaps:
    """Each row's shares, 100 % at 1 and `10**-DECADES` of that, or less, at 0, linearly in log10."""
    return _decades(row_shares(maps))


def log_decades(maps: StepMaps) -> StepMaps:
    """Map the largest entry of all maps to 1 and `10**-DECADES` of it, or less, to 0, linearly in log10.

    With three decades, 1, 0.1, 0.01 and 0.0001 become 1, 2/3, 1/3 and 0.
    """
    if maps.numel() == 0 or not bool((maps > 0).any()):
        return torch.zeros_like(maps)
    return _decades(maps / maps.max())


def signed_extent(maps: StepMaps) -> StepMaps:
    """Divide by the largest size of any entry of all maps, signs kept."""
    return maps / (float(maps.abs().max()) or 1.0) if maps.numel() else maps.clone()


def _decades(relative: StepMaps) -> StepMaps:
    """The clamp keeps log10 off zero; -DECADES is where the scale ends anyway."""
    return (1 + relative.clamp(min=10.0**-DECADES).log10() / DECADES).clamp(0, 1)


def _ratio(maps: StepMaps, by: Float[Tensor, "*map query_step 1"]) -> StepMaps:
    return torch.where(by > 0, maps / torch.where(by > 0, by, 1), 0).to(maps.dtype)
