"""The testbed model's files: how they are written, checked and read.

A folder holds `model.safetensors`, `config.json`, `tokenizer.json` with its configuration, `card.md`, and
`checksums.json` with the SHA-256 of each of them. Reading compares the checksums first, so weights and card
that do not belong together are refused. Writing goes to a folder beside the target, which then takes its
place: an interrupted run leaves the old files as they were.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from stepflow_tl.errors import ModelError
from stepflow_tl.results.files import file_digest

SHIPPED = Path(__file__).parent / "shipped"
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


def new_model(n_vocab: int) -> Any:
    """An untrained transformers `Qwen2ForCausalLM` of the testbed's shape, from torch's random state."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(vocab_size=n_vocab, **CONFIG))


def save_weights(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    settings: dict[str, Any],
    accuracy: dict[int, float],
    n_graded: int,
    minutes: float,
) -> None:
    """Write the files of a trained model.

    Args:
        model: As `new_model` returns it, trained.
        tokenizer: Its tokenizer.
        folder: Where to; what is there is replaced.
        settings: Training settings, for the card.
        accuracy: Part of right answers by number of steps, for the card.
        n_graded: Problems behind each of these.
        minutes: Training time, for the card.
    """
    staged = folder.with_name(folder.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    (staged / "generation_config.json").unlink(missing_ok=True)
    (staged / "card.md").write_text(_card(model, settings, accuracy, n_graded, minutes), encoding="utf-8")
    sums = {file.name: file_digest(file) for file in sorted(staged.iterdir())}
    (staged / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    staged.rename(folder)


def read_weights(folder: Path = SHIPPED) -> tuple[Any, Any]:
    """The transformers model, in eval mode and float32, and its tokenizer.

    Raises:
        ModelError: If a file is missing or is not the one that was written, or they are of another shape.
    """
    import torch
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
            "a model with python -m stepflow_tl.testbed.train --out FOLDER and name that folder."
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
                f"The testbed model's {listed} names {name[:80]!r}, which is no file of its folder."
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
    for name, expected in {**CONFIG, "vocab_size": n_vocab}.items():
        if config.get(name) != expected:
            raise ModelError(
                f"{folder} does not hold the testbed model: {name} is {config.get(name)!r}, expected "
                f"{expected!r}"
            )


def _card(
    model: Any, settings: dict[str, Any], accuracy: dict[int, float], n_graded: int, minutes: float
) -> str:
    import torch
    import transformers

    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    options = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in settings.items())
    rows = "\n".join(f"| {n_steps} | {part:.3f} |" for n_steps, part in accuracy.items())
    return f"""# Testbed model

Qwen2 architecture, {n_parameters / 1e6:.2f} M parameters, {CONFIG["num_hidden_layers"]} layers, \
{CONFIG["num_attention_heads"]} query heads on {CONFIG["num_key_value_heads"]} KV heads, width \
{CONFIG["hidden_size"]}, context {N_CTX}. It works out chains of definitions step by step between think tags
(`stepflow_tl/testbed/problems.py`), and does nothing else. Licence: that of this package.

Data: problems drawn while it trains, none from anywhere else. Written by

```sh
python -m stepflow_tl.testbed.train {options} --out FOLDER
```

in {minutes:.0f} minutes on {platform.machine()}, {torch.get_num_threads()} CPU threads,
torch {torch.__version__}, transformers {transformers.__version__}.

Greedy answers that are right, {n_graded} fresh problems a row (no distractors):

| steps | right |
|---:|---:|
{rows}
"""
