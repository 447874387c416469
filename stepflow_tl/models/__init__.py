"""Models: loading them, their hook points, and the facts that the rest of the package asks of one."""

from stepflow_tl.models.loading import load_default_model as load_default_model
from stepflow_tl.models.loading import load_model as load_model
