"""Step-Saliency and StepFlow for TransformerLens.

Where does a reasoning model look, step by step, and where does that flow break? This package computes the
step maps of "Reasoning Fails Where Step Flow Breaks" (ACL 2026, arXiv 2604.06695) for any TransformerLens
model.

The public names below are imported on first use (PEP 562), so `import stepflow_tl` costs next to nothing:
nothing heavier than the standard library is loaded until a name is asked for.
"""

import importlib
from typing import TYPE_CHECKING

from stepflow_tl.version import __version__ as __version__

if TYPE_CHECKING:
    from stepflow_tl.causal import StepKnockout as StepKnockout
    from stepflow_tl.causal import step_knockout as step_knockout
    from stepflow_tl.diagnosis import compare as compare
    from stepflow_tl.diagnosis import diagnose as diagnose
    from stepflow_tl.models.loading import load_default_model as load_default_model
    from stepflow_tl.models.loading import load_model as load_model
    from stepflow_tl.rendering import report as report
    from stepflow_tl.rendering import show as show
    from stepflow_tl.runs import analyze_dataset as analyze_dataset
    from stepflow_tl.runs import evaluate as evaluate
    from stepflow_tl.runs import summarize as summarize
    from stepflow_tl.saliency import StepSaliency as StepSaliency
    from stepflow_tl.saliency import step_saliency as step_saliency
    from stepflow_tl.stepflow import StepFlow as StepFlow
    from stepflow_tl.stepflow import bridge_hook as bridge_hook
    from stepflow_tl.stepflow import momentum_hook as momentum_hook
    from stepflow_tl.testbed.model import load_testbed_model as load_testbed_model
    from stepflow_tl.trace import ReasoningTrace as ReasoningTrace
    from stepflow_tl.trace import Segment as Segment
    from stepflow_tl.trace import Step as Step

_HOME_OF = {
    "ReasoningTrace": "stepflow_tl.trace",
    "Segment": "stepflow_tl.trace",
    "Step": "stepflow_tl.trace",
    "StepFlow": "stepflow_tl.stepflow",
    "StepKnockout": "stepflow_tl.causal",
    "StepSaliency": "stepflow_tl.saliency",
    "analyze_dataset": "stepflow_tl.runs",
    "bridge_hook": "stepflow_tl.stepflow",
    "compare": "stepflow_tl.diagnosis",
    "diagnose": "stepflow_tl.diagnosis",
    "evaluate": "stepflow_tl.runs",
    "load_default_model": "stepflow_tl.models.loading",
    "load_model": "stepflow_tl.models.loading",
    "load_testbed_model": "stepflow_tl.testbed.model",
    "momentum_hook": "stepflow_tl.stepflow",
    "report": "stepflow_tl.rendering",
    "show": "stepflow_tl.rendering",
    "step_knockout": "stepflow_tl.causal",
    "step_saliency": "stepflow_tl.saliency",
    "summarize": "stepflow_tl.runs",
}

__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
