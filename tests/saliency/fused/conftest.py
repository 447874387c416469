import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import jaxtyping
import pytest
import torch


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads; puts it back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["small", "default"])
def tile_size(request, monkeypatch, threads):
    """Tiles so small that a short sequence has many, cut at odd places, on three threads; and real ones."""
    import stepflow_tl.saliency.fused.steps as steps
    import stepflow_tl.saliency.fused.sweep as sweep

    if request.param == "small":
        monkeypatch.setattr(steps, "KEYS_PER_TILE", 16)
        monkeypatch.setattr(sweep, "ROWS_PER_TILE", 40)
        monkeypatch.setattr(sweep, "SHORTEST_SHARED", 8)
        threads(3)


@pytest.fixture(scope="module")
def interpreted():
    """`interpreted(function, *args)`: the call's result from a process where Triton interprets.

    The interpreter must be on before Triton is first imported.
    """
    from stepflow_tl.saliency.fused.triton_pooling import available

    pool = ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=jaxtyping.install_import_hook,
        initargs=("stepflow_tl", "signature_checks.checked"),
    )
    call = lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()  # noqa: E731
    with pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert call(available, torch.device("cpu"), torch.float32)  # starts the process, too
        yield call
