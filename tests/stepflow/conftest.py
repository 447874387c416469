"""Traces of every shape and tiny models of the attention variants that matter to StepFlow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY_MODEL_KINDS, _draw_weights, build_tiny_model, build_tiny_tokenizer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.model_bridge import TransformerBridge

PARTS = (
    "What is 2 + 3 times 4?",
    "First, the product: 12.\n\nThen añadir 2 – that is 14.\n\nSo 14.",
    "The product comes first.\n\nThe answer is 14.",
)


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """By the way in which the thinking markers are tokenised."""
    return {tags: build_tiny_tokenizer(think_tags=tags) for tags in ("added", "special", "plain")}


@pytest.fixture
def make_trace(tokenizers) -> Callable[..., Any]:
    """`make_trace(question, thinking, summary, tags=...)`: a trace read off its own token ids."""
    from stepflow_tl.trace import ReasoningTrace

    def make(question=PARTS[0], thinking=PARTS[1], summary=PARTS[2], *, tags="added", **options):
        tokenizer = tokenizers[tags]
        ids = ReasoningTrace.from_parts(tokenizer, question, thinking, summary, **options).tokens
        return ReasoningTrace.from_tokens(tokenizer, ids, **options)

    return make


@pytest.fixture
def trace(make_trace):
    """One question, three thinking steps, two summary steps."""
    return make_trace()


def _config(kind: str, **options: Any) -> tuple[Any, type]:
    shape = dict(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attn_implementation="eager",
        pad_token_id=256,
        bos_token_id=256,
        eos_token_id=258,
    )
    if kind == "mistral":
        shape |= dict(sliding_window=16)
        names = ("MistralConfig", "MistralForCausalLM")
    elif kind == "gemma2":
        shape |= dict(sliding_window=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
        names = ("Gemma2Config", "Gemma2ForCausalLM")
    else:
        shape |= dict(
            sliding_window=16, num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager"
        )
        names = ("GptOssConfig", "GptOssForCausalLM")
    config_class, model_class = (getattr(transformers, name) for name in names)
    return config_class(architectures=[names[1]], **(shape | options)), model_class


@pytest.fixture(scope="session")
def flow_model(tokenizers) -> Callable[..., Any]:
    """`flow_model(kind, padded=False)`: a tiny model, built once.

    In float64 the transformers models turn padding into NaN (their mask overflows the float32 softmax), so
    batches with padding run in float32, on fewer layers to keep rounding small.
    """
    built: dict[tuple, Any] = {}

    def build(kind: str, *, padded: bool = False) -> Any:
        key = (kind, padded)
        dtype = torch.float32 if padded and kind != "hooked" else torch.float64
        if key not in built:
            tokenizer = tokenizers["added"]
            if kind in TINY_MODEL_KINDS:
                n_layers = 4 if padded else 8
                built[key] = build_tiny_model(
                    kind, n_layers=n_layers, tokenizer=tokenizer, d_vocab=len(tokenizer), dtype=dtype
                )
            else:
                built[key] = _bridged(kind, tokenizer, dtype)
        return built[key]

    return build


def _bridged(kind: str, tokenizer: Any, dtype: torch.dtype) -> Any:
    config, model_class = _config(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf_model = model_class(config).to(dtype).eval()
        model = TransformerBridge.boot_transformers(
            f"tiny-{kind}", hf_model=hf_model, tokenizer=tokenizer, device="cpu", dtype=dtype
        )
        _draw_weights(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


@pytest.fixture(scope="session")
def run_cached() -> Callable[..., torch.Tensor]:
    """`run_cached(model, ids, mask, cuts)`: logits of a sequence given in pieces, the KV cache carrying the
    past."""

    def run(model: Any, ids: torch.Tensor, mask: torch.Tensor, cuts: list[int]) -> torch.Tensor:
        edges = [0, *cuts, ids.shape[1]]
        pieces, cache = [], None
        if not hasattr(model, "original_model"):
            cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", ids.shape[0])
        for start, end in zip(edges, edges[1:], strict=False):
            piece = ids[:, start:end]
            if hasattr(model, "original_model"):
                logits, cache = model(
                    piece,
                    return_type="logits_and_cache",
                    past_key_values=cache,
                    use_cache=True,
                    attention_mask=mask[:, :end],
                )
            else:
                logits = model(piece, past_kv_cache=cache, attention_mask=mask[:, start:end])
            pieces.append(logits)
        return torch.cat(pieces, 1)

    return run
