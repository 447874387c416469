import pytest
import torch
from jaxtyping import TypeCheckError

from stepflow_tl.models.gguf import _split_halves_from_pairs


def test_signatures_are_checked_at_run_time_while_the_tests_run():
    # Without the import hook every other test would pass with wrong shapes in the signatures.
    with pytest.raises(TypeCheckError, match="weight"):
        _split_halves_from_pairs(torch.zeros(2, 2, 2), n_heads=1)
