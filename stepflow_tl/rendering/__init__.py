"""Pictures of results: circuitsvis views for notebooks, matplotlib figures for papers, a report page.

`show` and `report` are the two verbs; the functions behind them are here too, with all their options. Nothing
is drawn or imported until a name is asked for (PEP 562), and the plotting libraries only when a picture is.
No function here touches the network or pyplot's global state: a figure belongs to no window and is saved with
`save_figure`; a view is displayed by a notebook, and its `.save(path)` writes a page.
"""

from typing import TYPE_CHECKING

from stepflow_tl.lazy import lazy_face

if TYPE_CHECKING:
    from stepflow_tl.rendering.agreement_scatter import agreement_figure as agreement_figure
    from stepflow_tl.rendering.arcs import arc_figure as arc_figure
    from stepflow_tl.rendering.change_maps import flow_figure as flow_figure
    from stepflow_tl.rendering.change_maps import patching_figure as patching_figure
    from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView as CircuitsvisView
    from stepflow_tl.rendering.notebook import show as show
    from stepflow_tl.rendering.profiles import comparison_figure as comparison_figure
    from stepflow_tl.rendering.profiles import profile_figure as profile_figure
    from stepflow_tl.rendering.report_page import report as report
    from stepflow_tl.rendering.sheet import save_figure as save_figure
    from stepflow_tl.rendering.step_maps import step_map_figure as step_map_figure
    from stepflow_tl.rendering.views import show_knockout as show_knockout
    from stepflow_tl.rendering.views import show_step_maps as show_step_maps
    from stepflow_tl.rendering.views import show_text as show_text

__getattr__, __dir__, __all__ = lazy_face(__name__)
