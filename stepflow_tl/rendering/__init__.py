"""Pictures of step maps: matplotlib figures for papers, circuitsvis views for notebooks, a report page.

Nothing is drawn or imported until a name is asked for (PEP 562), and the plotting libraries only when a
picture is. No function here touches the network or pyplot's global state.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepflow_tl.rendering.agreement_scatter import agreement_figure as agreement_figure
    from stepflow_tl.rendering.arcs import arc_figure as arc_figure
    from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView as CircuitsvisView
    from stepflow_tl.rendering.export import save_figure as save_figure
    from stepflow_tl.rendering.flow_maps import flow_figure as flow_figure
    from stepflow_tl.rendering.group_profiles import comparison_figure as comparison_figure
    from stepflow_tl.rendering.knockout_view import show_knockout as show_knockout
    from stepflow_tl.rendering.patching_map import patching_figure as patching_figure
    from stepflow_tl.rendering.profiles import profile_figure as profile_figure
    from stepflow_tl.rendering.report.page import write_report as write_report
    from stepflow_tl.rendering.step_map_view import show_step_maps as show_step_maps
    from stepflow_tl.rendering.step_maps import step_map_figure as step_map_figure
    from stepflow_tl.rendering.text_view import show_text as show_text

_HOME_OF = {
    "agreement_figure": "stepflow_tl.rendering.agreement_scatter",
    "arc_figure": "stepflow_tl.rendering.arcs",
    "CircuitsvisView": "stepflow_tl.rendering.circuitsvis_view",
    "show_step_maps": "stepflow_tl.rendering.step_map_view",
    "show_text": "stepflow_tl.rendering.text_view",
    "show_knockout": "stepflow_tl.rendering.knockout_view",
    "save_figure": "stepflow_tl.rendering.export",
    "flow_figure": "stepflow_tl.rendering.flow_maps",
    "comparison_figure": "stepflow_tl.rendering.group_profiles",
    "patching_figure": "stepflow_tl.rendering.patching_map",
    "profile_figure": "stepflow_tl.rendering.profiles",
    "step_map_figure": "stepflow_tl.rendering.step_maps",
    "write_report": "stepflow_tl.rendering.report.page",
}

__all__ = [
    "CircuitsvisView",
    "agreement_figure",
    "arc_figure",
    "comparison_figure",
    "flow_figure",
    "patching_figure",
    "profile_figure",
    "save_figure",
    "show_knockout",
    "show_step_maps",
    "show_text",
    "step_map_figure",
    "write_report",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        public = ", ".join(__all__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {public}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
