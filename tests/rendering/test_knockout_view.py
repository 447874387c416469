"""The view of a knockout map: signed values on one scale, hostile labels escaped, nothing loaded."""

import dataclasses

import pytest
import torch
from made_maps import make_saliency
from rendered_pages import props_of


@pytest.fixture
def knockout():
    from stepflow_tl.causal import StepKnockout

    saliency = make_saliency(3, 1)
    n = len(saliency.labels)
    effects = torch.zeros(n, n, dtype=torch.float64)
    effects[1, 0], effects[2, 1] = 0.5, -2.0
    return StepKnockout(
        effects=effects,
        measured=torch.tril(torch.ones(n, n, dtype=torch.bool), -1),
        trace=saliency.trace,
        layers=(0,),
        n_layers=saliency.n_layers,
        heads=None,
        measure="nll",
        onto=None,
        provenance=dataclasses.replace(saliency.provenance, model_name="</script><b>"),
    )


def test_values_keep_their_sign_on_one_scale(knockout):
    view = knockout.show()
    props = props_of(view)
    values = torch.tensor(props["attention"])[0]
    assert float(values[1, 0]) == 0.25 and float(values[2, 1]) == -1.0
    assert props["tokens"] == knockout.labels and props["attentionHeadNames"] == ["nll"]
    assert "from 2 (purple, the cut hurts)" in view.html and "</script><b>" not in view.html
    assert "pairs were measured" in view.html


def test_a_map_without_any_effect_is_white(knockout):
    empty = dataclasses.replace(knockout, effects=torch.zeros_like(knockout.effects))
    assert "NaN" not in empty.show(pooling="mean").html[-5000:]
