"""One error family.

Every error this package raises on purpose derives from `StepflowError`, so a run over thousands of traces can
catch one class, record the reason and go on. Each message names what was wrong, what was expected and what to
do. `require` imports an optional package, or raises the error that names its install command.
"""

import importlib
from types import ModuleType


class StepflowError(Exception):
    """Base of every error that `stepflow_tl` raises on purpose."""


class TraceError(StepflowError, ValueError):
    """A trace cannot be built from this text, these tokens or these parts."""


class FormatError(TraceError):
    """The reasoning format is unknown, ambiguous, or the text does not follow it."""


class ModelError(StepflowError, ValueError):
    """The model lacks something the analysis needs (a hook point, context length, vocabulary)."""


class FusedRefusal(ModelError):
    """Fused attention cannot serve this run exactly. `backend="auto"` takes another backend then."""

    def __init__(self, reason: str) -> None:
        """State the reason; the advice is the same for all."""
        super().__init__(f"backend='fused' cannot serve this run: {reason}. Use backend='hooks', or 'auto'.")
        self.reason = reason


class ObjectiveError(StepflowError, ValueError):
    """The objective is unknown, is not a scalar, or touches no token it could measure."""


class AlignmentError(StepflowError, ValueError):
    """The steps of two traces, or of a trace and a request, cannot be matched as asked."""


class ScoreError(StepflowError, ValueError):
    """A score is unknown, or a map's score has negative entries where shares of a row are asked for."""


class GradientError(StepflowError, ArithmeticError):
    """A gradient is missing or not finite, so no saliency can be stated."""


class ResultFileError(StepflowError, ValueError):
    """A result file is truncated, foreign, or of a version this package does not read."""


class DiskFullError(ResultFileError):
    """The disk, a quota or a limit on file sizes has no room left: nothing that follows could be written."""


class InputFileError(StepflowError, ValueError):
    """An input file or one of its records cannot be read."""


class ComparisonError(StepflowError, ValueError):
    """Two groups of traces cannot be compared as asked."""


class MissingExtraError(StepflowError, ImportError):
    """An optional dependency is not installed; the message carries the install command."""


class ProblemError(StepflowError, ValueError):
    """A testbed problem cannot be made with these numbers, or a problem file's record cannot be read."""


class KnockoutError(StepflowError, ValueError):
    """A step knockout's pairs or measure are not such that an effect could be stated."""


class SandboxError(StepflowError, RuntimeError):
    """Code that a model wrote cannot or may not be run: the sandbox is incomplete, or nobody allowed it."""


def require(module: str, *, purpose: str, extra: str) -> ModuleType:
    """Import `module`, which the extra called `extra` installs.

    Raises:
        MissingExtraError: If the module's package is not installed. A package that is installed but broken
            raises its own error, which says more.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise MissingExtraError(
            f"{purpose} needs {package}, which is not installed. "
            f"Install it with: pip install 'stepflow-tl[{extra}]'"
        ) from error
