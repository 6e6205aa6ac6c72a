"""DeepSpeed's ZeRO: the numbers of one process, though each holds a part alone of what is shared out."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from rlhf.checkpoint import StageFolder
from rlhf.config import load_config
from rlhf.deepspeed_config import deepspeed_settings
from rlhf.deepspeed_keys import ZERO, Refused
from rlhf.models.sharded import own_part
from rlhf.processes import Processes
from rlhf.zero import check_accepted, load_deepspeed
from tests.stage_runs import first_of_two_says, read_lines, run_stage, run_until, same_results
from tests.test_processes import close, copy_of, has_the_numbers_of, words_of

ENGINES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")

# DeepSpeed leaves small weights whole in every process, and all of a tiny model's are small.
NOTHING_SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def words_under(run: Path, stage: str, engine: str, count: int = 2) -> list[str]:
    words = [*words_of(run, stage, count), f"engine={engine}"]
    if engine.startswith("zero3"):
        path = run.parents[2] / "nothing_small.json"  # the same for copies of a run
        path.write_text(json.dumps(NOTHING_SMALL))
        words.append(f"engine.deepspeed_config={path}")
    return words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "engine", "count"),
    [
        ("sft", "zero2", 2),
        ("rm", "zero2", 2),
        ("ppo", "zero1", 2),
        ("ppo", "zero2", 3),
        ("ppo", "zero2", 1),
        ("ppo", "zero2_offload", 2),
        ("sft", "zero3", 2),
        ("rm", "zero3", 2),
        ("ppo", "zero3", 2),
        ("ppo", "zero3_offload", 2),
    ],
)
def test_training_has_the_numbers_of_one_process_without_deepspeed(
    tiny_run: Path, tmp_path: Path, stage: str, engine: str, count: int
) -> None:
    run = copy_of(tiny_run, tmp_path, stage)
    result = has_the_numbers_of(tiny_run, run, stage, words_under(run, stage, engine, count))
    assert "/ld:" not in result.output, "what DeepSpeed could not compile is no message for users"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "engine", "count", "settings"),
    [
        ("ppo", "zero2", 2, ["adapter=lora", "adapter.r=4"]),
        ("ppo", "zero2", 2, ["adapter=qlora", "adapter.r=4"]),
        ("ppo", "zero2", 3, ["batch_size=2", "minibatches=1"]),  # one process has nothing to compute
        ("ppo", "zero2", 2, ["algo=rloo", "rollouts_per_prompt=2", "ptx_coef=0.1", "epochs=2"]),
        ("sft", "zero3", 2, ["adapter=lora", "adapter.r=4"]),
        ("sft", "zero3", 2, ["packing=true", "examples=80", "epochs=1"]),
        (
            "sft",
            "zero2",
            2,
            ["exposure=scheduled_sampling", "examples=160", "adapter=lora", "adapter.r=4"],
        ),
        ("sft", "zero3", 2, ["exposure=scheduled_sampling", "exposure.passes=2", "examples=160"]),
        ("rm", "zero3", 2, ["adapter=lora", "adapter.r=4", "engine.tokens_per_pass=60"]),
        ("ppo", "zero3", 2, ["algo=rloo", "rollouts_per_prompt=2", "ptx_coef=0.1", "epochs=2"]),
        ("ppo", "zero3", 2, ["engine.tokens_per_pass=100", "minibatches=3", "gradient_checkpointing=true"]),
        ("ppo", "zero3", 2, ["keep_every=2", "save_every=2"]),
        ("ppo", "zero3", 3, ["adapter=lora", "adapter.r=4", "batch_size=2", "minibatches=1"]),
    ],
)
def test_every_kind_of_run_has_the_numbers_of_one_process(  # noqa: PLR0913 (fixtures and parameters)
    tiny_run: Path, tmp_path: Path, stage: str, engine: str, count: int, settings: list[str]
) -> None:
    own = [*settings, *(["updates=3"] if stage == "ppo" else [])]
    alone, several = (copy_of(tiny_run, tmp_path / name, stage) for name in ("alone", "several"))
    assert run_stage(stage, *words_under(alone, stage, "single", 1), *own).status == 0
    result = run_stage(stage, *words_under(several, stage, engine, count), *own)
    assert result.status == 0, result.output
    ours, theirs = (read_lines(run / stage / "metrics.jsonl") for run in (several, alone))
    assert all(close(mine, other) for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)
    for name in ("update_2", "model") if "keep_every=2" in settings else ():
        kept, other = (load_file(run / stage / name / "model.safetensors") for run in (several, alone))
        assert all(torch.allclose(kept[key], other[key], atol=1e-5) for key in other), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "engine", "more"),
    [
        ("ppo", "zero2", ["save_every=1"]),
        ("sft", "zero3", []),
        ("ppo", "zero3", ["save_every=1"]),
    ],
)
def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(
    tiny_run: Path, tmp_path: Path, stage: str, engine: str, more: list[str]
) -> None:
    whole, run = (copy_of(tiny_run, tmp_path / name, stage) for name in ("whole", "parts"))
    assert run_stage(stage, *words_under(whole, stage, engine), *more).status == 0

    words = [*words_under(run, stage, engine), *more]
    folder = StageFolder(str(run.parent), run.name, stage)
    killed = run_until(lambda: folder.latest_state() is not None, stage, *words)
    assert killed.status == -9, killed.output
    other_count = tmp_path / "other" / "runs" / run.name
    shutil.copytree(run, other_count)
    resumed = run_stage(stage, *words, "resume=true")
    assert resumed.status == 0, resumed.output
    assert same_results(run / stage, whole / stage)

    refused = run_stage(stage, *words_of(other_count, stage), *more, "resume=true")
    assert f"engine.name ({engine} -> ddp)" in refused.error
    resumed = run_stage(stage, *words_under(other_count, stage, engine, 1), *more, "resume=true")
    assert resumed.status == 0, resumed.output
    ours, theirs = (read_lines(place / stage / "metrics.jsonl") for place in (other_count, whole))
    assert all(close(mine, other) for mine, other in zip(ours[:5], theirs[:5], strict=True))


SHARED = """
import json, math, sys
import torch
from rlhf.models.sharded import whole_weights
from rlhf.processes import processes
from rlhf.zero import Root, ShardedAdamW, share_out

settings, steps = json.loads(sys.argv[1]), int(sys.argv[2])
together, generator = processes(), torch.Generator().manual_seed(0)
def numbers(*shape): return torch.randn(*shape, generator=generator)
class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(numbers(*shape)) for shape in ((5, 7), (11,)))
    def forward(self, row): return (row @ self.first).square().sum() + (self.second * row.sum()).sum()
two = Two()
root, (first, second) = Root([two]), two.parameters()
shares_weights = settings["zero_optimization"]["stage"] == 3
if shares_weights:
    share_out(root, settings)
    assert not first.numel() and not second.numel()
groups = [{"params": [first], "lr": 0.1, "weight_decay": 0.1}]
groups += [{"params": [second], "lr": 0.2, "weight_decay": 0.0}]
roots = [root] if shares_weights else []
optimizer = ShardedAdamW([groups], settings, together, clip=1.0, epsilon=1e-5, roots=roots)
norms = []
for step in range(steps):
    if step == 2:
        optimizer.load_state_dict(optimizer.state_dict())
    inputs = numbers(4, 5)
    for row in range(together.rank, 4, together.count):
        optimizer.backward(root.run(lambda: two(inputs[row])), last=row + together.count >= 4)
    norms += optimizer.norms()
    optimizer.step()
own = optimizer.engines[0].optimizer
flats = own.fp32_partitioned_groups_flat if shares_weights else own.single_partition_of_fp32_groups
state = optimizer.state_dict()
with whole_weights(two):
    found = {"norms": norms, "first": first.tolist(), "second": second.tolist()}
found["held"] = sum(len(each) for each in flats)
moments = [state["state"][index] for index in range(2)]
found["moments"] = [each[key].tolist() for each in moments for key in ("exp_avg", "exp_avg_sq")]
optimizer.backward(root.run(lambda: two(inputs[0])) * float(sys.argv[3]), last=True)
found["finite"] = math.isfinite(optimizer.norms()[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "last"), zip(ENGINES, ("inf", "nan", "nan", "inf", "nan"), strict=True))
def test_each_process_holds_half_and_all_make_the_steps_of_torch(engine: str, last: str) -> None:
    settings = deepspeed_settings(load_config("ppo", [f"engine={engine}"]).engine)
    assert settings is not None
    if "zero3" in engine:
        settings["zero_optimization"] |= NOTHING_SMALL["zero_optimization"]
    found = first_of_two_says(SHARED, json.dumps(settings), "4", last)
    assert 5 * 7 + 11 <= 2 * found["held"] <= 5 * 7 + 11 + 8, "half, and some padding"

    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((5, 7), (11,))
    )
    groups = [{"params": [first], "lr": 0.1, "weight_decay": 0.1}, {"params": [second], "lr": 0.2}]
    optimizer, norms = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0), []
    for _ in range(4):
        optimizer.zero_grad()
        inputs = torch.randn(4, 5, generator=generator)
        ((inputs @ first).square().sum() + (second * inputs.sum()).sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([first, second], 1.0)))
        optimizer.step()
    assert not found["finite"]
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    for ours, theirs in ((found["first"], first), (found["second"], second)):
        torch.testing.assert_close(torch.tensor(ours), theirs.detach(), rtol=1e-5, atol=1e-6)
    moments = [optimizer.state[each][key] for each in (first, second) for key in ("exp_avg", "exp_avg_sq")]
    for mine, theirs in zip(found["moments"], moments, strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs, rtol=1e-4, atol=1e-7)


def read_own(path: Path, *words: str, stage: str = "ppo", **given: Any) -> Any:
    """The DeepSpeed settings of a stage with a file of the user's own."""
    path.write_text(json.dumps(given))
    config = load_config(stage, ["engine=zero2", f"engine.deepspeed_config={path}", *words])
    return deepspeed_settings(config.engine)


def test_of_every_setting_of_zero_it_is_decided_whether_it_is_taken() -> None:
    load_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = dict(DeepSpeedZeroConfig.model_fields)
    assert ZERO.keys() == {field.alias or name for name, field in theirs.items()}
    for key in ("offload_param", "offload_optimizer"):
        (offload,) = (part for part in get_args(theirs[key].annotation) if part is not type(None))
        assert ZERO[key].keys() == offload.model_fields.keys()
    for name, field in theirs.items():
        kind = ZERO[field.alias or name]
        if isinstance(kind, Refused):
            given = field.get_default(call_default_factory=True)
            assert name == "leaf_module" or not kind.holds(given), name


def test_a_users_own_configuration_is_laid_over_ours(tmp_path: Path) -> None:
    own: dict[str, Any] = {"zero_optimization": {"reduce_bucket_size": 1000}, "steps_per_print": 7}
    assert read_own(tmp_path / "mine.json", **own) == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "steps_per_print": 7,
    }


@pytest.mark.parametrize("stage", ["sft", "ppo", "evaluate"])
def test_a_file_may_say_what_our_keys_say_or_leave_it_to_them(tmp_path: Path, stage: str) -> None:
    same = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": "auto",
            "zero_quantized_weights": False,
            "compute_grad_norm": True,
        },
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0 if stage != "ppo" else "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
        "fp16": {"enabled": False, "loss_scale": 0},
        "bf16": {"enabled": True},
        "prescale_gradients": False,
        "communication_data_type": "fp32",
        "amp": {"enabled": False},
    }
    words = ("engine.micro_batch_size=4", "engine.dtype=bfloat16")
    assert read_own(tmp_path / "mine.json", *words, stage=stage, **same) == {
        "zero_optimization": {"stage": 2}
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"gradient_clipping": 0.5},
            r"gradient_clipping=0.5 contradicts clip.grad_norm=1.0: leave it out, or",
        ),
        ({"train_batch_size": 7}, r"train_batch_size=7 contradicts batch_size=\d+"),
        ({"optimizer": {"params": {"lr": 3.0}}}, r"optimizer.params.lr=3.0 contradicts learning_rate=\d"),
        ({"scheduler": {"type": "WarmupLR"}}, r'scheduler.type="WarmupLR" contradicts warmup_updates=\d'),
        ({"zero_optimization": "auto"}, r"zero_optimization is no mapping: give it keys of its own"),
        ({"zero_optimization": {"offload_param": "auto"}}, r"zero_optimization.offload_param is no mapping"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled=true contradicts engine.dtype=auto"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled=true contradicts engine.dtype=auto"),
        (
            {"zero_optimization": {"stage": 1}},
            r"zero_optimization.stage=1 contradicts engine=zero2: set engine=zero1",
        ),
        (
            {"zero_optimization": {"stage": 9}},
            r"zero_optimization.stage=9 contradicts engine=zero2: leave it out",
        ),
        ({"zero_optimization": 2}, r"zero_optimization is no mapping"),
        (
            {"zero_optimisation": {}},
            r"zero_optimisation is no key of DeepSpeed's; did you mean zero_optimization\?",
        ),
        ({"steps_per_prnt": 1}, r"steps_per_prnt is no key of DeepSpeed's; did you mean steps_per_print\?"),
        ({"prescale_gradients": True}, r"prescale_gradients=true is not supported: leave it out"),
        (
            {"communication_data_type": "fp16"},
            r'communication_data_type="fp16" contradicts the type in which',
        ),
        (
            {"zero_optimization": {"zero_quantized_gradients": True}},
            r"zero_optimization.zero_quantized_gradients=true is not supported \(it changes the results\)",
        ),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 2}},
            r".*zero_hpz_partition_size=2 is not support",
        ),
        ({"zero_optimization": {"stge": 2}}, r"zero_optimization.stge is no key .*; did you mean stage\?"),
        (
            {"zero_optimization": {"reduce_bucket_size": -5}},
            r"zero_optimization.reduce_bucket_size=-5: a whole number above 0 is expected",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "5e8"}},
            r'zero_optimization.reduce_bucket_size="5e8": a whole number above 0 is expected',
        ),
        ({"zero_optimization": {"overlap_comm": 1}}, r"zero_optimization.overlap_comm=1: true or false"),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, r".*allgather_bucket_size=3: an even whole"),
        ({"fp16": True}, r"fp16 is no mapping: give it keys of its own, for instance enabled"),
        ({"optimizer": {"params": {"lrr": 1}}}, r"optimizer.params.lrr is no key of .*; did you mean lr\?"),
        ({"optimizer": {"params": {"amsgrad": True}}}, r"optimizer.params.amsgrad=true is not supported"),
        ({"comms_logger": {"enabld": True}}, r"comms_logger.enabld is no key .*; did you mean enabled\?"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            r'zero_optimization.offload_param.device="cpu" has no effect under engine=zero2, .*zero3_offload',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r'zero_optimization.offload_optimizer.device="nvme": none or cpu \(nvme is not supported\)',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "fast_init": True}}},
            r"zero_optimization.offload_optimizer.fast_init=true is not supported \(it is for nvme",
        ),
        ({"amp": {"enabled": True}}, r'amp=\{"enabled": true\} is not supported: leave it out'),
        ({"elasticity": {"enabled": True}}, r"elasticity=.* is not supported: leave it out"),
    ],
)
def test_what_a_file_may_not_say_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"mine\.json: " + message):
        read_own(tmp_path / "mine.json", **given)


def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    offload: dict[str, Any] = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    with pytest.raises(
        ValueError,
        match=r'device="none" contradicts engine.deepspeed.zero_optimization.offload_optimizer.device="cpu"',
    ):
        read_own(path, "engine=zero2_offload", **offload)
    with pytest.raises(ValueError, match=r"needs DeepSpeed: set engine=zero1, zero2 or zero3"):
        read_own(path, "engine=single")
    for text, message in (
        ("{", r"mine.json cannot be read as JSON"),
        ("[]", r"mine.json is no JSON object"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', r"mine.json: stage is given 2 times: leave it"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config("ppo", ["engine=zero2", f"engine.deepspeed_config={path}"])


def test_keys_given_by_words_are_checked_as_those_of_a_file() -> None:
    with pytest.raises(
        ValueError, match=r"zero_optimization.stage=3 contradicts engine=zero2: set engine=zero3"
    ):
        load_config("ppo", ["engine=zero2", "engine.deepspeed.zero_optimization.stage=3"])
    with pytest.raises(ValueError, match=r"engine.deepspeed.amp=true is not supported"):
        load_config("ppo", ["engine=zero2", "engine.deepspeed.amp=true"])


def test_what_deepspeed_itself_refuses_is_said_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^zero_optimization.reduce_buket_size=1 in engine.deepspeed"
    ) as found:
        check_accepted({"zero_optimization": {"stage": 2, "reduce_buket_size": 1}})
    assert "did you mean reduce_bucket_size?" in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"zero_optimization.reduce_bucket_size=many .* DeepSpeed says"):
        check_accepted({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}})


def test_a_critic_on_the_policys_trunk_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(
        ValueError, match=r"critic_trunk=policy .* engine=zero1: use critic_trunk=own, or engine=ddp"
    ):
        load_config("ppo", ["engine=zero1", "critic_trunk=policy"])


def test_quantized_weights_are_not_shared_out_and_refused_before_anything_is_loaded() -> None:
    remedy = "use adapter=lora, or engine=zero2_offload"
    with pytest.raises(ValueError, match=rf"adapter=qlora.*engine=zero3_offload.*{remedy}"):
        load_config("ppo", ["engine=zero3_offload", "adapter=qlora"])


@pytest.mark.parametrize(("rank", "own"), [(0, [1.0, 2.0]), (1, [3.0]), (2, [])])
def test_what_fills_up_a_part_of_a_shared_weight_is_none_of_its_numbers(
    monkeypatch: pytest.MonkeyPatch, rank: int, own: list[float]
) -> None:
    parts = [[1.0, 2.0], [3.0, math.nan], [math.nan, math.inf]]
    parameter = SimpleNamespace(ds_tensor=torch.tensor(parts[rank]), ds_numel=3)
    monkeypatch.setattr("rlhf.models.sharded.processes", lambda: Processes(rank, 3))
    assert own_part(parameter).tolist() == own
