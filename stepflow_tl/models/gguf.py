r"""Read a GGUF checkpoint into a transformers model and tokenizer, in seconds.

transformers can do this by itself (`gguf_file=`), and the tests use it as the oracle: the same weights, bit
for bit. But it takes a minute for half a billion weights, and where it does not know what a file asks for (a
rope scaling, a pre-tokenizer) it computes on without. So the architectures of reasoning models are read here,
and everything else is left to transformers.

Algorithm:
    1. Walk the header once: key-value metadata, then the table of tensors (name, shape, quantisation,
       offset). Every tensor must lie inside the file.
    2. Build the configuration from the metadata, and compare all names and shapes with the model that it
       describes; nothing is allocated yet. What would change the computation and is not known is refused.
    3. Dequantise with the `gguf` package, a few rows at a time, straight into the wanted dtype. For the Llama
       architecture undo llama.cpp's reordering of query and key rows: it pairs rotary dimensions
       (2i, 2i+1), transformers pairs (i, i + d/2).
    4. Hand configuration and weights to transformers, which ties the embedding where the file has no head.
    5. Build the tokenizer from the vocabulary of the metadata (`gguf_tokenizer`).

Cost for Qwen2.5-Coder-0.5B (630 M weights, Q4_K_M) on one CPU core: 1 s for the header and the tokenizer, 5 s
for the weights; transformers takes 15 s and 57 s. Memory: the model in the wanted dtype plus some tens of MB,
however large one tensor is. The file is mapped, not read into memory.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.gguf_file import GgufFile, TensorEntry, read_from
from stepflow_tl.models.gguf_tokenizer import build_tokenizer

# general.architecture -> the family whose `...Config` and `...ForCausalLM` transformers has.
_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_ROTATES_PAIRS = ("llama",)
# Keys that change what a model computes, in ways that these families' transformers classes do not.
_NOT_COMPUTED = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)

# llama.cpp's name of a module inside a block -> transformers' name of it inside a layer.
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_HEAD = "output.weight"
_ROPE_DIVISORS = "rope_freqs.weight"  # Llama 3.1: what each rotary frequency is divided by; no parameter


class GgufCheckpoint(GgufFile):
    """A GGUF file read as a language model."""

    def config(self) -> Any:
        """The transformers configuration that the metadata describes.

        Raises:
            ModelError: If the architecture is not read here, the metadata lacks a value or has one of the
                wrong kind, or it asks for what the architecture's transformers class does not compute.
        """
        import transformers

        with read_from(self.path):
            facts = self.facts
            for key in _NOT_COMPUTED:
                if facts.get(key):
                    raise ModelError(
                        f"{self.path} has {self.architecture}.{key} = {facts[key]}, which is not computed "
                        "here; the numbers would be wrong. Load the model from its original folder or hub "
                        "name."
                    )
            n_heads, hidden_size = facts["attention.head_count"], facts["embedding_length"]
            head_dim = facts.get("attention.key_length", hidden_size // n_heads)
            if facts.get("rope.dimension_count", head_dim) != head_dim:
                raise ModelError(
                    f"{self.path} rotates {facts['rope.dimension_count']} of the {head_dim} dimensions of a "
                    "head; only models that rotate all of them are read."
                )
            ggml = "tokenizer.ggml."
            return getattr(transformers, f"{self._family()}Config")(
                vocab_size=facts.get("vocab_size", len(self.metadata.get(f"{ggml}tokens", ()))),
                hidden_size=hidden_size,
                intermediate_size=facts["feed_forward_length"],
                num_hidden_layers=facts["block_count"],
                num_attention_heads=n_heads,
                num_key_value_heads=facts.get("attention.head_count_kv", n_heads),
                head_dim=head_dim,
                max_position_embeddings=facts["context_length"],
                rms_norm_eps=facts["attention.layer_norm_rms_epsilon"],
                rope_parameters=self._rope(facts),
                bos_token_id=self.metadata.get(f"{ggml}bos_token_id"),
                eos_token_id=self.metadata[f"{ggml}eos_token_id"],
                pad_token_id=self.metadata.get(f"{ggml}padding_token_id"),
                tie_word_embeddings=self._entry(_HEAD) is None,
            )

    def _rope(self, facts: dict[str, Any]) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", 10_000.0)}
        scaling, divisors = facts.get("rope.scaling.type", "none"), self._entry(_ROPE_DIVISORS)
        if scaling not in ("none", "linear"):
            raise ModelError(
                f"{self.path} scales its rotary positions by {scaling!r}; only 'linear' and 'none' are read."
            )
        factor = facts["rope.scaling.factor"] if scaling == "linear" else 1.0
        if divisors is None:
            return rope if scaling == "none" else rope | {"rope_type": "linear", "factor": factor}
        # "longrope" is transformers' type that takes one divisor per frequency. Both lists are the same, so
        # its change of lists at the original context length changes nothing; its temperature is off.
        both = (factor * self.dequantise(divisors, torch.float32)).tolist()
        return rope | {
            "rope_type": "longrope",
            "short_factor": both,
            "long_factor": both,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": facts["context_length"],
        }

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Dequantised weights under their names in transformers' model, one at a time.

        Raises:
            ModelError: If a tensor is unknown, not finite, or quantised in a way that cannot be decoded.
        """
        with read_from(self.path):
            n_heads = {}
            if self.architecture in _ROTATES_PAIRS:
                facts = self.facts
                n_heads["attn_q"] = facts["attention.head_count"]
                n_heads["attn_k"] = facts.get("attention.head_count_kv", n_heads["attn_q"])
            for entry in self._parameters():
                weight = self.dequantise(entry, dtype)
                name, module = _transformers_name(entry.name)
                if module in n_heads:
                    weight = _split_halves_from_pairs(weight, n_heads[module])
                yield name, weight

    def model(self, dtype: torch.dtype, device_map: str | None = None) -> Any:
        """The transformers model in eval mode, with eager attention.

        Args:
            dtype: Of the parameters.
            device_map: accelerate's placement. Without one the model is on the CPU.

        Raises:
            ModelError: If the configuration and the tensors do not fit each other; that is seen before any
                weight is allocated. Or if the architecture is read neither here nor by transformers.
        """
        if self.architecture not in _FAMILIES:
            return self._model_of_transformers(dtype, device_map)
        config = self.config()
        self.check_shapes(config)
        config._attn_implementation = "eager"
        with _no_progress_bar():
            # With a state dict in hand transformers skips its random initialisation, which alone takes
            # seconds, and takes the tensors as they are.
            return self._class().from_pretrained(
                None, config=config, state_dict=dict(self.weights(dtype)), dtype=dtype, device_map=device_map
            )

    def _model_of_transformers(self, dtype: torch.dtype, device_map: str | None) -> Any:
        import transformers

        # Recent versions may keep weights packed, without gradients, unless told not to.
        packing = getattr(transformers, "GgufConfig", None)
        options = {} if packing is None else {"quantization_config": packing(dequantize=True)}
        try:
            with _no_progress_bar():
                model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    self.path.parent,
                    gguf_file=self.path.name,
                    dtype=dtype,
                    device_map=device_map,
                    attn_implementation="eager",
                    **options,
                )
        except Exception as error:  # three libraries read, each with errors of its own
            raise ModelError(
                f"{self.path} holds architecture {self.architecture!r}; read here are "
                f"{', '.join(_FAMILIES)}. transformers' reader was tried and failed "
                f"({type(error).__name__}: {str(error)[:200]})."
            ) from error
        # The weights are ordinary ones now. As long as the model says otherwise it refuses to be saved.
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        return model

    def check_shapes(self, config: Any) -> None:
        """Compare every tensor's shape with what `config` asks for; nothing is allocated.

        Raises:
            ModelError: If one differs, is missing, or is foreign.
        """
        with read_from(self.path):
            matches = (re.match(r"blk\.(\d+)\.", entry.name) for entry in self.tensors)
            blocks = {int(match[1]) for match in matches if match}
            if config.num_hidden_layers != len(blocks) or blocks != set(range(len(blocks))):
                raise ModelError(
                    f"{self.path} says {config.num_hidden_layers} layers and has the tensors of "
                    f"{len(blocks)}."
                )
            with torch.device("meta"):  # shapes without memory
                skeleton = self._class()(config)
            expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
            found = {_transformers_name(entry.name)[0]: entry.shape for entry in self._parameters()}
            if missing := sorted(expected.keys() - found.keys()):
                raise ModelError(
                    f"{self.path} lacks {len(missing)} of the model's {len(expected)} tensors, first "
                    f"{missing[0]}. Convert or fetch it again."
                )
            for name in sorted(found):
                if expected.get(name) != found[name]:
                    raise ModelError(
                        f"{self.path} has {name} of shape {found[name]}; its configuration asks for "
                        f"{expected.get(name, 'no such tensor')}."
                    )

    def tokenizer(self) -> Any:
        """The tokenizer of the file, with its chat template; see `gguf_tokenizer`.

        Raises:
            ModelError: If there is none, it is damaged, or it asks for a rule to cut text that is not known.
        """
        with read_from(self.path):
            return build_tokenizer(self.path, self.metadata, self.facts.get("context_length"))

    def _family(self) -> str:
        if self.architecture not in _FAMILIES:
            raise ModelError(
                f"{self.path} holds architecture {self.architecture!r}; read here are {', '.join(_FAMILIES)}."
            )
        return _FAMILIES[self.architecture]

    def _class(self) -> Any:
        import transformers

        return getattr(transformers, f"{self._family()}ForCausalLM")

    def _entry(self, name: str) -> TensorEntry | None:
        return next((entry for entry in self.tensors if entry.name == name), None)

    def _parameters(self) -> Iterator[TensorEntry]:
        return (entry for entry in self.tensors if entry.name != _ROPE_DIVISORS)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _transformers_name(gguf_name: str) -> tuple[str, str]:
    """The parameter's name in transformers' model, and the bare name of its module in GGUF.

    A tensor that no model here has keeps its own name, by which `check_shapes` refuses it.
    """
    match gguf_name.split("."):
        case ["blk", layer, module, kind] if module in _BLOCK_MODULES:
            return f"model.layers.{layer}.{_BLOCK_MODULES[module]}.{kind}", module
        case [module, kind] if module in _MODULES:
            return f"{_MODULES[module]}.{kind}", module
    return gguf_name, ""


def _split_halves_from_pairs(
    weight: Float[Tensor, "head_d_head d_model"], n_heads: int
) -> Float[Tensor, "head_d_head d_model"]:
    """Rows of each head from rotary order (0, 1), (2, 3), ... to all first partners, then all second ones."""
    d_model = weight.shape[1]
    return weight.reshape(n_heads, -1, 2, d_model).transpose(1, 2).reshape(-1, d_model)
