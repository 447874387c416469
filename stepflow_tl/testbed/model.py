"""`load_testbed_model`: the miniature reasoning model, its files checked, ready for TransformerLens.

A folder holds `model.safetensors`, `config.json`, `tokenizer.json` with its configuration, `card.md`, and
`checksums.json` with the SHA-256 of each of them; `scripts/train_testbed.py` writes it. Reading compares the
checksums first, so weights and card that do not belong together are refused, then the sizes, before anything
is allocated.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from stepflow_tl.errors import ModelError
from stepflow_tl.models.loading import boot_bridge, tokenizer_in_memory
from stepflow_tl.results.files import file_digest

NAME = "stepflow-testbed"
#: The form of problem that each shipped model solves, by its number of layers; 12 have bands of three.
FORMS: dict[int, dict[str, Any]] = {6: {}, 12: {"n_asked": 2, "long_steps": True}}
DEPTHS = tuple(FORMS)
SHIPPED = {depth: Path(__file__).parent / "shipped" / f"{depth}_layers" for depth in DEPTHS}
N_CTX = 1024
_NEEDED = {"model.safetensors", "config.json", "tokenizer.json"}
CONFIG: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=N_CTX,
    tie_word_embeddings=True,
    initializer_range=0.07,  # transformers' 0.02 is for widths of thousands: here it leaves attention flat
    bos_token_id=1,
    eos_token_id=0,
)


def load_testbed_model(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    n_layers: int = DEPTHS[0],
    hooked_transformer: bool = False,
    folder: str | Path | None = None,
) -> Any:
    """A trained testbed model as a TransformerBridge, in eval mode, offline.

    It solves the problems of `stepflow_tl.testbed.problems` in the form `FORMS[n_layers]` and nothing else;
    `card.md` beside the weights says how well. Takes about a second.

    Args:
        device: Where the model goes.
        dtype: Of the parameters.
        n_layers: Which of the two: 6 (steps of one line), or 12 (steps of several lines, answers that need
            two thinking steps).
        hooked_transformer: Return TransformerLens 3.9's HookedTransformer instead, weights as they are
            (no folding, no centring).
        folder: In place of `n_layers`, a folder that `scripts/train_testbed.py` wrote.

    Raises:
        ModelError: If no model of that depth ships, a file is missing or damaged, or `hooked_transformer` is
            asked of TransformerLens 4, which has none.
    """
    if folder is None and n_layers not in SHIPPED:
        raise ModelError(f"n_layers={n_layers}: no such testbed model ships; expected one of {DEPTHS}")
    hf_model, tokenizer = read_weights(SHIPPED[n_layers] if folder is None else Path(folder))
    hf_model = hf_model.to(device=device, dtype=dtype)
    if hooked_transformer:
        return _hooked(hf_model, tokenizer, device, dtype)
    return boot_bridge(hf_model, tokenizer, NAME, dtype)


def new_model(n_vocab: int, n_layers: int = DEPTHS[0]) -> Any:
    """An untrained transformers `Qwen2ForCausalLM` of the testbed's shape, from torch's random state."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape: dict[str, Any] = {**CONFIG, "num_hidden_layers": n_layers}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=n_vocab, **shape))


def read_weights(folder: Path = SHIPPED[DEPTHS[0]]) -> tuple[Any, Any]:
    """The transformers model, in eval mode and float32, and its tokenizer.

    Raises:
        ModelError: If a file is missing or is not the one that was written, or they are of another shape.
    """
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    check_files(folder)
    _check_shape(folder)
    # Not from_pretrained, which draws a progress bar for a model that loads in a moment.
    with torch.random.fork_rng(devices=[]):  # the weights drawn first are thrown away
        model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder, local_files_only=True))
    missing, foreign = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if set(missing) - {"lm_head.weight"} or foreign:  # tied to the embedding, so not in the file
        raise ModelError(f"{folder} does not hold the testbed model: missing {missing}, foreign {foreign}")
    model.tie_weights()
    model.requires_grad_(False)
    # By name, not AutoTokenizer: that one would make a tokenizer of the Qwen2 family of it.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def check_files(folder: Path) -> None:
    """Compare every file with its checksum.

    Raises:
        ModelError: If a file is missing or is not the one that was written.
    """
    listed = folder / "checksums.json"
    if not listed.is_file():
        raise ModelError(
            f"No testbed model in {folder}: checksums.json is missing. Install the package again, or train "
            "a model with scripts/train_testbed.py --out FOLDER and name that folder."
        )
    try:
        sums = json.loads(listed.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"The testbed model's {listed} cannot be read ({error}): train it again.") from error
    if not isinstance(sums, dict) or not sums.keys() >= _NEEDED:
        raise ModelError(
            f"The testbed model's {listed} does not list {', '.join(sorted(_NEEDED))}: train it again."
        )
    for name, expected in sums.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name, re.ASCII):
            raise ModelError(
                f"The testbed model's {listed} names {name[:80]!r}, which is not a file of its folder."
            )
        file = folder / name
        if not file.is_file():
            raise ModelError(f"The testbed model's {file} is missing: train it again.")
        if file_digest(file) != expected:
            raise ModelError(
                f"The testbed model's {file} is not the file that was written with it (SHA-256 differs): "
                "train it again."
            )


def _check_shape(folder: Path) -> None:
    """Refuse a configuration that is not the testbed's before anything of its sizes is allocated.

    From the file itself, because transformers already makes lists as long as the number of layers.
    """
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        (n_vocab, _) = file.get_slice("model.embed_tokens.weight").get_shape()
    depth = config.get("num_hidden_layers")
    shape = {**CONFIG, "vocab_size": n_vocab, "num_hidden_layers": depth if depth in DEPTHS else DEPTHS}
    for name, expected in shape.items():
        if config.get(name) != expected:
            raise ModelError(
                f"{folder} does not hold the testbed model: {name} is {config.get(name)!r}, expected "
                f"{expected!r}"
            )


def _hooked(hf_model: Any, tokenizer: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    import transformer_lens as lens

    try:
        conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
        build: Any = lens.HookedTransformer
        build_config: Any = lens.HookedTransformerConfig
    except (ImportError, AttributeError):
        raise ModelError(
            "hooked_transformer=True needs TransformerLens 3.9: version 4 has TransformerBridge only. Leave "
            "the argument out, or pip install 'transformer-lens<4'."
        ) from None
    config = hf_model.config
    d_head = config.hidden_size // config.num_attention_heads
    hooked = build_config(
        d_model=config.hidden_size,
        d_head=d_head,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn="silu",
        gated_mlp=True,
        final_rms=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        original_architecture="Qwen2ForCausalLM",
        model_name=NAME,
        device=str(device),
        dtype=dtype,
        default_prepend_bos=False,
    )
    with tokenizer_in_memory(tokenizer, NAME):
        model = build(hooked, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        conversions.convert_qwen2_weights(hf_model, hooked),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
