"""`show`: any result as what a notebook displays best.

The kinds and what they become:

1. `StepSaliency`: its step maps, or with one more argument the text (`step=`), the maps before and after a
   repair (`repaired=`), or saliency against knockout (`knockout=`).
2. `StepKnockout`: its map. `StepPatching`: effects over layers and steps.
3. `Diagnosis`: shares over depth. `Comparison`: both groups over depth, and their difference.

Maps and text are circuitsvis views, the others matplotlib figures. Neither needs a network. The library is
imported when something is shown, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.diagnosis.comparison_result import Comparison
from stepflow_tl.diagnosis.diagnosis import Diagnosis
from stepflow_tl.rendering.agreement_scatter import agreement_figure
from stepflow_tl.rendering.change_maps import flow_figure, patching_figure
from stepflow_tl.rendering.profiles import comparison_figure, profile_figure
from stepflow_tl.rendering.views import show_knockout, show_step_maps, show_text
from stepflow_tl.saliency.result import StepSaliency

_ALTERNATIVES: dict[str, Callable[..., Any]] = {
    "step": show_text,
    "repaired": flow_figure,
    "knockout": agreement_figure,
}


def show(result: Any, **options: Any) -> Any:
    """Show a result in a notebook, as the last expression of a cell.

    Args:
        result: A `StepSaliency`, `StepKnockout`, `StepPatching`, `Diagnosis` or `Comparison`.
        **options: Of the view it becomes. A `StepSaliency` takes `layer`, `scale`, `pooling` and
            `check` (`rendering.show_step_maps`); with `step="T3"` those of `rendering.show_text`, with
            `repaired=another` those of `rendering.flow_figure`, with `knockout=effects` those of
            `rendering.agreement_figure`. The others: `rendering.show_knockout`, `patching_figure`,
            `profile_figure`, `comparison_figure`.

    Returns:
        A circuitsvis view, which has `.save(path)` and `.html`, or a matplotlib figure for `save_figure`.

    Raises:
        TypeError: If it is a result of another kind, or has no such option.
        MissingExtraError: If the drawing library is not installed.
    """
    for kind, view in _VIEWS.items():
        if isinstance(result, kind):
            return view(result, **options)
    kinds = ", ".join(kind.__name__ for kind in _VIEWS)
    raise TypeError(f"cannot show a {type(result).__name__}: expected a result, one of {kinds}")


def _show_saliency(saliency: StepSaliency, **options: Any) -> Any:
    asked = [name for name in _ALTERNATIVES if options.get(name) is not None]
    if len(asked) > 1:
        raise TypeError(f"{' and '.join(asked)} ask for different views of one saliency: pass one of them")
    for name in asked:
        return _ALTERNATIVES[name](saliency, options.pop(name), **options)
    return show_step_maps(saliency, **options)


_VIEWS: dict[type, Callable[..., Any]] = {
    StepSaliency: _show_saliency,
    StepKnockout: show_knockout,
    StepPatching: patching_figure,
    Diagnosis: profile_figure,
    Comparison: comparison_figure,
}
