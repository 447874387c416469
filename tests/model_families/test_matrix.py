"""Every family of the support table: what works, what is refused and how, and that the table says so.

The page docs/models.md is held row by row against what is found here, so a change of the package, of
TransformerLens or of transformers that moves a row fails until `python docs/scripts/model_support.py` writes
it again, and shows in its diff.
"""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from float64 import float64_everywhere
from tiny_architectures import ARCHITECTURES, build_bridge
from tiny_models import TL_GENERATION
from transformer_lens.hook_points import HookPoint

from stepflow_tl import StepFlow, step_knockout, step_saliency
from stepflow_tl.errors import ModelError
from stepflow_tl.trace.formats import known_formats

pytestmark = [
    pytest.mark.skipif(
        TL_GENERATION < 4, reason="a TransformerBridge of these families needs TransformerLens 4"
    ),
    pytest.mark.filterwarnings("ignore"),  # of transformers and TransformerLens, about tiny configurations
]

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "scripts" / "model_support.py"
# Families with reasoning models of their own; whatever else changes, they work altogether.
REASONING = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gpt_oss",
    "mistral",
    "ministral3",
    "phi3",
    "olmo3",
    "smollm3",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "granite",
    "deepseek_v3",
    "exaone4",
    "ernie4_5_moe",
    "cohere2",
    "seed_oss",
    "hunyuan_v1_dense",
)
HYBRID = ("qwen3_next", "falcon_h1")
REFUSED = ("mamba", "rwkv")
QUICK = (*REASONING, *HYBRID, *REFUSED, "gemma3", "phimoe", "glm_moe_dsa", "bitnet")


def load_script():
    spec = importlib.util.spec_from_file_location("model_support", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_support"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def page():
    return script.PAGE.read_text("utf-8")


FAMILIES = [
    pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_is_found(name, page):
    support = script.measured(name)
    if name in REASONING:
        assert support.status == "works", script.reasons(support)
    if name in REFUSED:
        assert support.status == "refused"
    assert script.row(name, support) in page.splitlines(), f"run `python docs/scripts/{SCRIPT.name}`"
    lines, expected = page.splitlines(), script.reasons(support)
    for reason, refused in expected.items():
        assert f"`{name}` ({refused})" in lines[lines.index(f"- {reason}") + 1]
    assert page.count(f"`{name}` (") == len(expected)


def test_the_page_has_a_row_a_family_and_names_the_versions(page):
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(ARCHITECTURES)

    named = {name for family in ARCHITECTURES.values() for name in family.formats}
    assert named <= set(known_formats())
    for package in script.VERSIONS:
        assert f"{package} {version(package)}" in page


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_a_model_without_patterns_is_refused_before_any_hook_is_attached(name, tiny_tokenizer, monkeypatch):
    model, trace = build_bridge(name), script.made_trace()
    monkeypatch.setattr(HookPoint, "add_hook", lambda *a, **k: pytest.fail("a hook was attached"))
    attempts = [lambda b=b: step_saliency(model, trace, backend=b) for b in ("auto", "hooks", "layerwise")]
    attempts += [
        lambda: StepFlow().hooks(model, trace),
        lambda: StepFlow().generating(model).__enter__(),
        lambda: step_knockout(model, trace),
    ]
    advice = "Layers 1, 3 have one: choose among them" if name == "qwen3_next" else "No layer of this model"
    for attempt in attempts:
        with pytest.raises(ModelError, match=r"it mixes positions with `\w+`") as refusal:
            attempt()
        assert advice in str(refusal.value)


@pytest.mark.parametrize("backend", ["hooks", "layerwise"])
def test_attention_layers_of_a_hybrid_give_what_autograd_gives(backend):
    """The oracle: patterns retained by hand, one ordinary backward pass."""
    model, trace = build_bridge("qwen3_next"), script.made_trace()
    with float64_everywhere():
        found = step_saliency(model, trace, backend=backend, objective="response", layers=[3, 1])
        patterns = {}

        def keep(pattern, hook):
            pattern.retain_grad()
            patterns[int(hook.name.split(".")[1])] = pattern

        names = [f"blocks.{layer}.attn.hook_pattern" for layer in (1, 3)]
        with model.hooks(fwd_hooks=[(name, keep) for name in names]):
            logits = model(trace.tokens[None], return_type="logits")
        ids, steps = trace.tokens, trace.step_ids
        is_response = (trace.segment_ids >= 2).nonzero()[:, 0]
        nll = torch.nn.functional.cross_entropy(logits[0, is_response - 1], ids[is_response])
        nll.backward()
    for row, layer in enumerate((3, 1)):
        product = (patterns[layer] * patterns[layer].grad).abs()[0].detach()
        expected = torch.stack(
            [
                torch.stack(
                    [product[:, steps == i][:, :, steps == j].sum((1, 2)) for j in range(len(trace.steps))]
                )
                for i in range(len(trace.steps))
            ]
        ).permute(2, 0, 1)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found.sums[row], expected, rtol=1e-8, atol=1e-12)
