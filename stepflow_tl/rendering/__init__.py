"""Pictures of step maps: matplotlib figures for paper and page, a circuitsvis view for notebooks.

Nothing is drawn or imported until a name is asked for (PEP 562), and the plotting libraries only when a
picture is. No function here touches the network or pyplot's global state.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepflow_tl.rendering.circuitsvis_view import StepMapView as StepMapView
    from stepflow_tl.rendering.circuitsvis_view import show_step_maps as show_step_maps
    from stepflow_tl.rendering.export import save_figure as save_figure
    from stepflow_tl.rendering.knockout_view import show_knockout as show_knockout
    from stepflow_tl.rendering.profiles import profile_figure as profile_figure
    from stepflow_tl.rendering.step_maps import step_map_figure as step_map_figure

_HOME_OF = {
    "StepMapView": "stepflow_tl.rendering.circuitsvis_view",
    "show_step_maps": "stepflow_tl.rendering.circuitsvis_view",
    "show_knockout": "stepflow_tl.rendering.knockout_view",
    "save_figure": "stepflow_tl.rendering.export",
    "profile_figure": "stepflow_tl.rendering.profiles",
    "step_map_figure": "stepflow_tl.rendering.step_maps",
}

__all__ = [
    "StepMapView",
    "profile_figure",
    "save_figure",
    "show_knockout",
    "show_step_maps",
    "step_map_figure",
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
