"""The command line run in process on tiny random models."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """`run_cli("analyze", ...)` gives code, out and err."""
    from stepflow_tl.cli.main import main

    def run(*arguments: Any) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def loaded_model(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]) -> Any:
    """`load_model` returns a tiny model with a context of 256 tokens, whatever its name."""
    from stepflow_tl.models import loading as models

    model = tiny_model()
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype: model)
    return model
