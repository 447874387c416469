"""What a repair does on finished traces: one forward pass of each under it, counted layer by layer.

The counts of each trace are one line of a journal, so that a kill costs the pass at work alone; the model is
loaded only where a trace has none yet. The sum over the traces is a `FlowReport` as that of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from stepflow_tl.models.passes import attached, frozen, model_device, whole_pass
from stepflow_tl.results.journal import Journal
from stepflow_tl.results.journal_lines import JournalKind
from stepflow_tl.results.plain_data import count, number
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.report import FlowReport, LayerReport
from stepflow_tl.trace import ReasoningTrace

_COUNTS = ("layer", "rows", "adjusted", "capped", "injections")
_SUMS = tuple(each.name for each in fields(LayerReport) if each.name not in _COUNTS)


def flow_counts(
    load: Callable[[], Any],
    flow: StepFlow,
    maps: Mapping[str, Path],
    journal: Path,
    settings: Mapping[str, str],
    *,
    note: Callable[[str], None] = lambda message: None,
) -> FlowReport:
    """The counts of `flow` over the traces of some maps, those in the journal as they are there.

    Args:
        load: Gives the model.
        flow: The repair.
        maps: Result file of each trace by the trace's id; the trace is read from there.
        journal: File of the counts, made if it does not exist.
        settings: What all counts have in common, such as the model's name.
        note: Told what was mended in the journal.

    Raises:
        ResultFileError: If the journal is in use, or of other settings, or a map cannot be read.
        ModelError: If the repair does not fit the model.
    """
    total, model = FlowReport(), None
    with Journal(journal, _KIND, {**settings, "stepflow": repr(flow)}, note=note) as kept:
        for name, path in maps.items():
            layers = kept.last(name)
            if layers is None:
                model = load() if model is None else model
                layers = tuple(_counted(model, flow, StepSaliency.load(path).trace).layers.values())
                data = [{key: getattr(layer, key) for key in (*_COUNTS, *_SUMS)} for layer in layers]
                kept.append({"kind": "flow", "id": name, "layers": data})
            for layer in layers:
                into = total.of(layer.layer)
                for key in (*_COUNTS[1:], *_SUMS):
                    setattr(into, key, getattr(into, key) + getattr(layer, key))
    return total


def _counted(model: Any, flow: StepFlow, trace: ReasoningTrace) -> FlowReport:
    hooks = flow.hooks(model, trace)
    with frozen(model), torch.no_grad(), attached(model, last=hooks):
        whole_pass(model, trace.tokens.to(model_device(model)))
    report = hooks.report()
    for layer in (*report.shallow, *report.deep):
        report.of(layer)  # a layer in which nothing happened is a finding too
    return report


def _layers(data: dict[str, Any]) -> tuple[LayerReport, ...]:
    found = []
    for each in data["layers"]:
        values: dict[str, Any] = {}
        for name in (*_COUNTS, *_SUMS):
            values[name] = count(each, name) if name in _COUNTS else number(each, name)
        found.append(LayerReport(**values))
    return tuple(found)


_KIND = JournalKind(
    what="journal of StepFlow's counts",
    of="repair",
    schema=1,
    entries=("flow",),
    check=_layers,
)
