"""Step-Saliency and StepFlow for TransformerLens.

Where does a reasoning model look, step by step, and where does that flow break? This package computes the
step maps of "Reasoning Fails Where Step Flow Breaks" (ACL 2026, arXiv 2604.06695) for any TransformerLens
model.

The public names below are imported on first use (PEP 562), so `import stepflow_tl` costs next to nothing:
nothing heavier than the standard library is loaded until a name is asked for.
"""

from typing import TYPE_CHECKING

from stepflow_tl.lazy import lazy_face
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

__getattr__, __dir__, __all__ = lazy_face(__name__)
