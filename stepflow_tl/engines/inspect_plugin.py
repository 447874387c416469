# pyright: reportMissingImports=false
"""What Inspect finds under its entry point: the provider "stepflow", which loads when it is asked for."""

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="stepflow")
def stepflow() -> type[ModelAPI]:
    """The provider of models named `stepflow/<model>`."""
    from stepflow_tl.engines.inspect_provider import StepFlowAPI

    return StepFlowAPI
