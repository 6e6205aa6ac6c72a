"""Decoding steps over a room of fixed size: the tokens are those of steps that grow their cache.

On a processor a step is computed anew each time; on a GPU it is replayed.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.decoding import Decoding
from rlhf.models.loading import LoadOptions, load_causal_lm
from rlhf.sampling import replay
from rlhf.sampling.sampler import draw_uniforms, sample
from tests.models.families import PAD, write_family

PROMPTS = [[1, 5, 9, 30, 12, 7, 40], [8], [1, 22, 6], [31, 11, 19, 4, 25], [9, 9], [1, 22, 6]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(folder: Path, family: str, device: str, **settings: Any) -> Any:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    write_family(folder, family, **settings)
    return load_causal_lm(str(folder / family), LoadOptions(device=torch.device(device)))


def sampled(model: Any, prompts: list[list[int]], decoding: Decoding, eos: int) -> list[list[int]]:
    uniforms = draw_uniforms(len(prompts), decoding.max_new_tokens, seed=3)
    return sample(model, prompts, decoding, eos_token_id=eos, pad_token_id=PAD, uniforms=uniforms).responses()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", replay.FAMILIES)
def test_replayed_steps_give_the_same_tokens(
    tmp_path: Path, family: str, kernel: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, family, device, sliding_window=None)
    model.set_attn_implementation(kernel)
    steps: list[replay.Step] = []
    made = replay.Step.__init__

    def noted(step: replay.Step, *arguments: Any) -> None:
        made(step, *arguments)
        steps.append(step)

    monkeypatch.setattr(replay.Step, "__init__", noted)
    monkeypatch.setattr(replay, "ROOM_STRIDE", 8)
    dropped = False
    for decoding in (Decoding(20), Decoding(20, greedy=True), Decoding(20, repetition_penalty=1.3)):
        found = {}
        for replays in (False, True):
            monkeypatch.setattr(replay, "can_replay", lambda *_, it=replays: it)
            steps.clear()
            rows = sampled(model, PROMPTS, decoding, eos=99)
            eos = max(
                {token for row in rows for token in row[2:]},
                key=lambda token: sum(token in row for row in rows),
            )
            found[replays] = [rows, sampled(model, PROMPTS, decoding, eos=eos)]
            assert bool(steps) is replays
        assert found[True] == found[False]
        assert len({step.room for step in steps}) > 1, "the room never grew"
        dropped |= len({len(step.tokens) for step in steps}) > 1
        assert any(step.graph is not None for step in steps) is (device == "cuda")
    assert dropped, "no row left the batch"


def test_what_cannot_be_replayed_is_computed_as_ever() -> None:
    def can(device: str = "cuda", layers: tuple[Any, ...] = (), **config: Any) -> bool:
        settings = {"model_type": "llama", "_attn_implementation": "sdpa", **config}
        model = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(**settings))
        return replay.can_replay(model, SimpleNamespace(layers=layers))

    assert can(layers=(replay.RoomyLayer(),))
    assert not can(device="cpu")
    assert not can(model_type="bloom")
    assert not can(_attn_implementation="flash_attention_2")
    assert not can(rope_parameters={"rope_type": "dynamic"})
    assert not can(quantization_config={"load_in_4bit": True})
    assert not can(layers=(object(),))
