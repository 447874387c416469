"""`scripts/train_testbed.py` as a module: it is run from a checkout, not installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_testbed.py"


@pytest.fixture(scope="session")
def training():
    spec = importlib.util.spec_from_file_location("train_testbed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
