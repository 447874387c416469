r"""Read a Llama-architecture GGUF checkpoint into a transformers model and tokenizer, in seconds.

transformers can do this by itself (`gguf_file=`), and the tests use it as the oracle: same weights, bit for
bit. For SmolLM2-135M it takes 25 to 30 s, because it parses the 98 000 vocabulary strings through numpy five
times and rebuilds its table of tensor names once a module. It also cuts text for the tokenizer wrongly: the
file asks for the `smollm` pre-tokenizer, which isolates every digit, and transformers falls back to GPT-2's.
White space before a digit then becomes tokens that the model never saw there, and numbered steps ("\n\n2.
...") are the very text we read.

Algorithm:
    1. Walk the header once: key-value metadata, then the table of tensors (name, shape, quantisation,
       offset).
    2. Dequantise each tensor with the `gguf` package and undo llama.cpp's reordering of query and key rows:
       it pairs rotary dimensions (2i, 2i+1), transformers pairs (i, i + d/2).
    3. Build the configuration from the metadata and hand both to transformers, which ties the embedding.
    4. Build the tokenizer from the vocabulary, merges and control tokens of the metadata.

Cost for SmolLM2-135M: 540 MB in float32, plus one dequantised tensor at a time.
"""

import contextlib
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ModelError

_MAGIC = b"GGUF"
_VERSION = 3
_STRING, _ARRAY = 8, 9
# GGUF value types of fixed size, by their number in the file, as struct formats.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CONTROL_TOKEN = 3

# llama.cpp's name of a module inside a block -> transformers' name of it inside a layer.
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `shape` as torch has it, `offset` in bytes from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int


@dataclass(frozen=True)
class GgufCheckpoint:
    """An opened GGUF file: its metadata in full, its tensors by place only."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    data_start: int

    @classmethod
    def open(cls, path: Path) -> "GgufCheckpoint":
        """Read the header.

        Raises:
            ModelError: If the file cannot be read, is not GGUF of version 3 in the Llama architecture, or
                ends too early.
        """
        with (
            _read_from(path),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:4] != _MAGIC:
                raise ModelError(
                    f"{path} is not a GGUF file: it starts with {data[:4]!r}, expected {_MAGIC!r}."
                )
            header = _Cursor(data, position=4)
            version, n_tensors, n_keys = header.unpack("<IQQ")
            if version != _VERSION:
                raise ModelError(f"{path} is GGUF version {version}; only version {_VERSION} is read.")
            # Counts need no check: each entry takes bytes, and the first one past the end is an error.
            metadata = {header.string(): header.value() for _ in range(n_keys)}
            tensors = tuple(header.tensor_entry() for _ in range(n_tensors))
            if metadata.get("general.architecture") != "llama":
                raise ModelError(
                    f"{path} holds architecture {metadata.get('general.architecture')!r}; only 'llama' is "
                    "read."
                )
            alignment = metadata.get("general.alignment", 32)
            return cls(path, metadata, tensors, data_start=-(-header.position // alignment) * alignment)

    def config(self) -> Any:
        """The transformers configuration that the metadata describes (a `LlamaConfig`).

        Raises:
            ModelError: If the metadata lacks a value, or has one that is none.
        """
        from transformers import LlamaConfig

        llama = {key.removeprefix("llama."): value for key, value in self.metadata.items()}
        with _read_from(self.path):
            return LlamaConfig(
                vocab_size=llama["vocab_size"],
                hidden_size=llama["embedding_length"],
                intermediate_size=llama["feed_forward_length"],
                num_hidden_layers=llama["block_count"],
                num_attention_heads=llama["attention.head_count"],
                num_key_value_heads=llama["attention.head_count_kv"],
                max_position_embeddings=llama["context_length"],
                rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
                rope_parameters={"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
                bos_token_id=llama["tokenizer.ggml.bos_token_id"],
                eos_token_id=llama["tokenizer.ggml.eos_token_id"],
                pad_token_id=llama["tokenizer.ggml.padding_token_id"],
                tie_word_embeddings=all(entry.name != "output.weight" for entry in self.tensors),
            )

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Dequantised weights under their names in `LlamaForCausalLM`, one at a time.

        Raises:
            ModelError: If the file ends inside a tensor, or a tensor is unknown or not finite.
        """
        with _read_from(self.path):
            yield from self._weights(dtype)

    def _weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        n_heads = {
            "attn_q": self.metadata["llama.attention.head_count"],
            "attn_k": self.metadata["llama.attention.head_count_kv"],
        }
        data = np.memmap(self.path, mode="r")
        for entry in self.tensors:
            quantization = GGMLQuantizationType(entry.quantization)
            block_size, block_bytes = GGML_QUANT_SIZES[quantization]
            row_bytes = entry.shape[-1] // block_size * block_bytes
            n_rows = entry.shape[0] if len(entry.shape) == 2 else 1
            start = self.data_start + entry.offset
            if start + n_rows * row_bytes > len(data):
                raise ModelError(f"{self.path} ends inside tensor {entry.name}; install it again.")
            blocks = np.asarray(data[start : start + n_rows * row_bytes]).reshape(n_rows, row_bytes)
            if quantization == GGMLQuantizationType.F32:
                values = blocks.view(np.float32).copy()  # a view would be read-only
            else:
                with np.errstate(all="ignore"):  # what is not finite is refused below
                    values = dequantize(blocks, quantization)
            if not np.isfinite(values).all():
                raise ModelError(f"{self.path} holds values in {entry.name} that are not finite.")
            weight = torch.from_numpy(values).reshape(entry.shape)
            name, module = _transformers_name(entry.name)
            if module in n_heads:
                weight = _split_halves_from_pairs(weight, n_heads[module])
            yield name, weight.to(dtype)

    def model(self, dtype: torch.dtype) -> Any:
        """A `LlamaForCausalLM` in eval mode, with eager attention, on the CPU.

        Raises:
            ModelError: If the configuration and the tensors do not fit each other. That is seen before any
                weight is allocated.
        """
        from transformers import LlamaForCausalLM
        from transformers.utils import logging as transformers_logging

        config = self.config()
        self.check_shapes(config)
        config._attn_implementation = "eager"
        had_progress_bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            # With a state dict in hand transformers skips its random initialisation, which alone takes
            # seconds.
            return LlamaForCausalLM.from_pretrained(
                None, config=config, state_dict=dict(self.weights(dtype)), dtype=dtype
            )
        finally:
            if had_progress_bar:
                transformers_logging.enable_progress_bar()

    def check_shapes(self, config: Any) -> None:
        """Compare every tensor's shape with what the configuration asks for; nothing is allocated.

        Args:
            config: As `config` returns it.

        Raises:
            ModelError: If one differs, is missing, or is foreign.
        """
        with _read_from(self.path):
            self._check_shapes(config)

    def _check_shapes(self, config: Any) -> None:
        from transformers import LlamaForCausalLM

        matches = (re.match(r"blk\.(\d+)\.", entry.name) for entry in self.tensors)
        blocks = {int(match[1]) for match in matches if match}
        if config.num_hidden_layers != len(blocks) or blocks != set(range(len(blocks))):
            raise ModelError(
                f"{self.path} says {config.num_hidden_layers} layers and has the tensors of {len(blocks)}."
            )
        with torch.device("meta"):  # shapes without memory
            skeleton = LlamaForCausalLM(config)
        expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        found = {_transformers_name(entry.name)[0]: entry.shape for entry in self.tensors}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ModelError(
                    f"{self.path} has {name} of shape {found.get(name)}; its configuration asks for "
                    f"{expected.get(name)}."
                )

    def tokenizer(self) -> Any:
        """The byte-level BPE tokenizer of the file (a `PreTrainedTokenizerFast`), with its chat template.

        Raises:
            ModelError: If the file asks for a pre-tokenizer other than `smollm`, or its vocabulary is none.
        """
        with _read_from(self.path):
            return self._tokenizer()

    def _tokenizer(self) -> Any:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in self.metadata.items()}
        if ggml.get("pre") != "smollm":
            raise ModelError(
                f"{self.path} asks for pre-tokenizer {ggml.get('pre')!r}; only 'smollm' is known."
            )
        tokens = ggml["tokens"]
        merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
        backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        control = [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, ggml["token_type"], strict=True)
            if kind == _CONTROL_TOKEN
        ]
        backend.add_special_tokens(control)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=tokens[ggml["bos_token_id"]],
            eos_token=tokens[ggml["eos_token_id"]],
            unk_token=tokens[ggml["unknown_token_id"]],
            pad_token=tokens[ggml["padding_token_id"]],
            additional_special_tokens=[token.content for token in control],
            chat_template=ggml["tokenizer.chat_template"],
            model_max_length=self.metadata["llama.context_length"],
            clean_up_tokenization_spaces=False,
        )


@contextlib.contextmanager
def _read_from(path: Path) -> Iterator[None]:
    """Whatever a damaged file provokes, here, in transformers, gguf or tokenizers, is a `ModelError`."""
    try:
        yield
    except (ModelError, MemoryError, ImportError):
        raise
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(f"{path} is truncated or damaged; install it again. ({reason})") from error


class _Cursor:
    """Reads the header's little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def unpack(self, layout: str) -> tuple:
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise struct.error(f"a string of {length} bytes at byte {start} runs past the end")
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int | None = None) -> Any:
        tag = self.unpack("<I")[0] if kind is None else kind
        if tag == _STRING:
            return self.string()
        if tag == _ARRAY:
            item_kind, length = self.unpack("<IQ")
            if item_kind in _SCALARS:
                return list(self.unpack(f"<{length}{_SCALARS[item_kind]}"))
            return [self.value(item_kind) for _ in range(length)]
        return self.unpack("<" + _SCALARS[tag])[0]

    def tensor_entry(self) -> TensorEntry:
        name = self.string()
        (n_axes,) = self.unpack("<I")
        axes = self.unpack(f"<{n_axes}Q")
        quantization, offset = self.unpack("<IQ")
        return TensorEntry(name, tuple(reversed(axes)), quantization, offset)


def _transformers_name(gguf_name: str) -> tuple[str, str]:
    """The parameter's name in `LlamaForCausalLM`, and the bare name of its module in GGUF."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        _, layer, module, kind = parts
        return f"model.layers.{layer}.{_BLOCK_MODULES[module]}.{kind}", module
    module, kind = parts
    return f"{_MODULES[module]}.{kind}", module


def _split_halves_from_pairs(
    weight: Float[Tensor, "head_d_head d_model"], n_heads: int
) -> Float[Tensor, "head_d_head d_model"]:
    """Rows of each head from rotary order (0, 1), (2, 3), ... to all first partners, then all second ones."""
    d_model = weight.shape[1]
    return weight.reshape(n_heads, -1, 2, d_model).transpose(1, 2).reshape(-1, d_model)
