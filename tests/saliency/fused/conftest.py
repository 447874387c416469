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
