import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="module")
def model():
    """The testbed model's shape with random weights, in float64: it writes nonsense, always the same."""
    from stepflow_tl.testbed.model import new_model
    from stepflow_tl.testbed.vocabulary import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.init_kwargs.update(add_bos_token=True, name_or_path="testbed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = new_model(len(tokenizer)).eval()
        with torch.no_grad():
            for parameter in inner.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
    return TransformerBridge.boot_transformers(
        "Qwen/Qwen2-0.5B", hf_model=inner, tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )


@pytest.fixture
def questions():
    from stepflow_tl.evaluation import questions_of
    from stepflow_tl.testbed import ProblemSpec, make_problems

    return questions_of([p for n in (2, 4, 3) for p in make_problems(ProblemSpec(n_steps=n), 3, seed=n)])
