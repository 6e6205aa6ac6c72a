"""Configuration: every shipped file composes, and every mistake is answered with the right key."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf import estimate
from rlhf.config import (
    CONFIG_DIR,
    GROUPS,
    PROJECT_DIR,
    STAGES,
    all_keys,
    group_choices,
    load_config,
    read_config,
    resolved_yaml,
    split_overrides,
    value_type,
)
from rlhf.hints import nearest

# What the files that leave something to the user need.
NEEDED = {
    "path": ["model.path=gpt2"],
    "small": ["model.path=gpt2"],
    "function": ["reward.function=module:score"],
    "openai": ["judge.model=m"],
}
# All samples of a prompt would be equal.
REFUSED = {
    ("collect", "greedy"): "draws nothing",
    ("evaluate", "discriminator"): "it is trained in stage=ppo",
}
CHOICES = [(group, choice) for group in GROUPS for choice in group_choices(group)]


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ([], True),
        (["reward=rouge_l"], True),
        (["algo=rloo", "rollouts_per_prompt=4"], True),  # the reward model is the critic of this run
        (["algo=reinforce", "reward=rouge_l"], False),
        (["algo=reinforce", "reward.path=some/rm/model"], False),
        (["critic_trunk=policy", "reward=bleu"], False),
    ],
    ids=str,
)
def test_a_critic_that_nothing_reads_is_not_asked_for(words: list[str], needed: bool) -> None:
    assert (load_config("ppo", words).critic is not None) == needed


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_shipped_file_composes_with_every_stage_that_has_its_group(group: str, choice: str) -> None:
    stages = [stage for stage in STAGES if value_type(stage, group) is not None]
    assert stages
    for stage in stages:
        if (stage, choice) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[stage, choice]):
                load_config(stage, [f"{group}={choice}"])
        else:
            load_config(stage, [f"{group}={choice}", *NEEDED.get(choice, [])])


def test_every_yaml_file_says_on_its_first_line_what_it_is() -> None:
    for path in CONFIG_DIR.rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_file_sets_exactly_the_keys_of_its_dataclass(stage: str) -> None:
    config = load_config(stage, [])
    assert [key for key in all_keys(stage) if value_type(stage, key) is None] == []
    assert config.name == "smollm2-film_reviews"
    assert config.runs == str(PROJECT_DIR / "runs")


def test_the_tiny_model_trains_whole_unless_an_adapter_is_named() -> None:
    assert load_config("sft", []).adapter.name == "lora"
    assert load_config("sft", ["model=tiny"]).adapter.name == "none"
    assert load_config("sft", ["model=tiny", "adapter=lora"]).adapter.name == "lora"
    assert load_config("sft", ["adapter=lora", "model=tiny"]).adapter.name == "lora"


@pytest.mark.parametrize("key", ["model", "model.path"])
def test_a_small_local_folder_trains_whole_unless_an_adapter_is_named(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    config = load_config("sft", [f"{key}={folder}"])
    assert (config.model.path, config.model.name) == (str(folder), "mine")
    assert (config.adapter.name, config.learning_rate) == ("none", 3e-3)
    assert load_config("sft", [f"{key}={folder}", "adapter=lora"]).adapter.name == "lora"
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(50_000_000)
    assert load_config("sft", [f"{key}={folder}"]).adapter.name == "lora"


def test_the_score_of_a_response_without_eos_may_be_negative() -> None:
    assert load_config("ppo", ["missing_eos_score=-5"]).missing_eos_score == -5


def test_settings_refer_to_each_other() -> None:
    full = load_config("sft", ["adapter=none"])
    assert full.learning_rate == full.model.learning_rate.sft
    assert load_config("ppo", ["adapter.learning_rate.ppo=1e-5"]).learning_rate == 1e-5
    assert load_config("sft", ["adapter=none", "adapter.learning_rate.sft=0.5"]).learning_rate == 0.5
    assert load_config("ppo", ["data.budget.ppo_updates=7"]).updates == 7
    sizes = load_config("rm", ["data.max_prompt_tokens=10", "data.max_response_tokens=5"])
    assert sizes.max_length == 15
    ppo = load_config("ppo", ["name=mine", "runs=/somewhere"])
    assert (ppo.policy, ppo.critic) == ("/somewhere/mine/sft/model", "/somewhere/mine/rm/model")
    assert ppo.reward == {"kind": "model", "path": "/somewhere/mine/rm/model"}


def test_reward_model_reads_the_data_sets_own_lists_else_what_collect_wrote() -> None:
    assert load_config("rm", ["name=n", "runs=/r"]).ranked.train == "/r/n/collect/ranked.jsonl"
    assert load_config("rm", ["data.ranked.train=mine.jsonl"]).ranked.train == "mine.jsonl"
    own = load_config("rm", ["data.ranked.train={path: p, split: train}"])
    assert own.ranked.train == {"path": "p", "split": "train"}


@pytest.mark.parametrize(
    ("word", "path", "name"),
    [
        ("model=gpt2", "gpt2", "gpt2"),
        ("model=EleutherAI/pythia-70m", "EleutherAI/pythia-70m", "pythia-70m"),
        ("model=./my models/é (1)", "./my models/é (1)", "é (1)"),
        ("model.path=gpt2", "gpt2", "gpt2"),
        ("model.path=smolm2", "smolm2", "smolm2"),
    ],
)
def test_any_model_works_in_the_same_key(word: str, path: str, name: str) -> None:
    config = load_config("sft", [word])
    assert (config.model.path, config.model.name) == (path, name)
    assert config.name == f"{name}-film_reviews"


def test_relative_runs_lie_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("ppo", ["runs=r", "name=n"]).policy == str(tmp_path / "r" / "n" / "sft" / "model")


@pytest.mark.parametrize(
    "text",
    [
        "a b",
        "it's",
        'say "hi"',
        "a=b",
        "{x}",
        "[1",
        "(1)",
        "é 中文 😀",
        "a,b",
        "x#y",
        "~/x",
        "C:\\x",
        "1e-3",
        "true",
        "a: b",
    ],
)
def test_a_text_survives_as_it_stands(text: str) -> None:
    assert load_config("sft", [f"name={text}"]).name == text
    assert load_config("sft", [f"model.revision={text}"]).model.revision == text


@pytest.mark.parametrize(
    "path", ["a b.jsonl", "it's.jsonl", "x=1 (2).jsonl", "é.jsonl", "~/x.jsonl", "a,b.jsonl"]
)
def test_a_source_path_survives_as_it_stands(path: str) -> None:
    assert load_config("sft", [f"data.demonstrations.train={path}"]).data.demonstrations.train == path


def test_quotes_around_a_value_are_not_part_of_it() -> None:
    assert load_config("sft", ["name='a b'"]).name == "a b"
    assert load_config("sft", ['data.demonstrations.train="a b"']).data.demonstrations.train == "a b"


def test_systems_are_replaced_as_a_whole_and_changed_one_by_one() -> None:
    mine = load_config("evaluate", ["systems={mine: /a (b)/c, theirs: gpt2}"])
    assert mine.systems == {"mine": "/a (b)/c", "theirs": "gpt2"}
    more = load_config("evaluate", ["systems.more=/x y", "systems.sft.best_of=2", "runs=/r", "name=n"])
    assert more.systems["more"] == "/x y"
    assert more.systems["sft"] == {"path": "/r/n/sft/model", "best_of": 2}
    assert list(more.systems)[:2] == ["base", "sft"]


def test_scorers_are_replaced_as_a_whole_and_changed_by_key() -> None:
    config = load_config("ppo", ["reward={kind: function, function: my.py:score}"])
    assert config.reward == {"kind": "function", "function": "my.py:score"}
    assert load_config("ppo", ["reward.path=/a b"]).reward == {"kind": "model", "path": "/a b"}
    assert load_config("evaluate", ["proxy=null", "gold=null"]).proxy is None
    assert load_config("evaluate", ["reward=function", "reward.function=m:f"]).proxy["function"] == "m:f"


def test_a_part_can_be_given_as_a_mapping() -> None:
    kl = load_config("ppo", ["kl={controller: adaptive, coef: 1e-2}"]).kl
    assert (kl.controller, kl.coef, kl.horizon) == ("adaptive", 0.01, 10000)


def test_a_path_source_takes_further_fields() -> None:
    config = load_config("sft", ["data.demonstrations.train=x.jsonl", "data.demonstrations.train.limit=5"])
    assert config.data.demonstrations.train == {"path": "x.jsonl", "limit": 5}


@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_configuration_reloads_equal(stage: str, tmp_path: Path) -> None:
    config = load_config(stage, ["model=tiny", "data=toy", "name=é 'x'", "seed=3"])
    (tmp_path / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    assert read_config(stage, tmp_path / "config.yaml") == config


SCHEDULED = "exposure=scheduled_sampling"
ADVERSARIAL = "reward=discriminator"
ZERO = "engine.deepspeed.zero_optimization"

MISTAKES = [
    ("evaluate", ["systems={a: x, a: y}"], "systems={a: x, a: y}: a stands there twice"),
    ("evaluate", ["systems={a:x,b:y,a:z}"], "systems={a:x,b:y,a:z}: a stands there twice"),
    ("evaluate", ["systems={a: {path: x, path: y}}"], "path stands there twice"),
    ("ppo", ["reward={kind: sum, parts: [{kind: bleu, kind: rouge_l}]}"], "kind stands there twice"),
    ("bench", ["num_processes=2"], "engine=single num_processes=2: several processes need both"),
    ("bench", ["engine=zero2"], "engine=zero2 num_processes=null: several processes need both"),
    (
        "bench",
        ["engine=ddp", "num_processes=2", "find_tokens_per_pass=true"],
        "find_tokens_per_pass=True is of one",
    ),
    ("bench", ["engine=ddp", "num_processes=2", "peer=x.py"], "peer=x.py is of one process"),
    ("ppo", ["main_port=99999"], "main_port=99999: a port from 1 to 65535 is expected"),
    ("ppo", ["main_port=0"], "main_port=0: a number that is at least 1 is expected"),
    ("sft", ["lerning_rate=1"], "lerning_rate is not a key of stage sft; did you mean learning_rate?"),
    ("ppo", ["coef=1"], "did you mean kl.coef?"),
    ("ppo", ["kl.coeff=1"], "did you mean kl.coef?"),
    ("sft", ["adapter.rank=1"], "adapter.rank is not a key"),
    ("sft", ["kl.coef=1"], "kl.coef is not a key of stage sft, but of ppo"),
    ("sft", ["ppo.kl.coef=1"], "ppo.<key> is for stage=ppo or stage=all"),
    ("sft", ["lr=3"], "lr is not a key of stage sft; did you mean learning_rate?"),
    ("sft", ["reward=model"], "reward is not a key of stage sft, but of ppo, evaluate"),
    ("ppo", ["kl={coefficient: 1}"], "did you mean kl.coef?"),
    ("ppo", ["kl=3"], "kl=3: it has keys of its own, for instance kl.controller=..."),
    ("sft", ["seed"], "'seed' is not key=value"),
    ("sft", ["=3"], "'=3' is not key=value"),
    ("sft", ["adapter.r=abc"], "adapter.r=abc: a whole number is expected"),
    ("sft", ["seed=1.5"], "seed=1.5: a whole number is expected"),
    ("sft", ["epochs=many"], "epochs=many: a number is expected"),
    ("sft", ["packing=maybe"], "packing=maybe: true or false is expected"),
    ("ppo", ["whiten_rewards=2"], "whiten_rewards=2: true or false is expected"),
    ("ppo", ["gae.lam=-1"], "gae.lam=-1.0: a number from 0 to 1 is expected"),
    ("sft", ["name=null"], "name=null: a text is expected"),
    ("sft", ["name="], "name= is empty"),
    ("sft", ["name=../../x"], "name=../../x: a name below runs= is expected"),
    ("sft", ["name=."], "name=.: a name below runs= is expected"),
    ("sft", ["runs="], "runs= is empty"),
    ("sft", ["adapter=none", "adapter.r=8"], "adapter.r=8 without an adapter: give adapter=lora"),
    (
        "sft",
        ["adapter=none", "adapter.quantization=nf4"],
        "nf4 without an adapter: give adapter=qlora",
    ),
    ("sft", ["adapter.r=0"], "adapter.r=0 with adapter=lora: at least 1 is expected"),
    ("sft", ["examples=0"], "examples=0: a number that is at least 1 is expected"),
    ("sft", ["log_steps=0"], "log_steps=0: a number that is at least 1 is expected"),
    ("sft", ["epochs=0"], "epochs=0.0: a number that is above 0 is expected"),
    ("sft", ["engine.device=gpu"], "engine.device=gpu: one of auto, cpu, cuda, cuda:<number>, mps"),
    ("sft", ["model.attention=flash"], "model.attention=flash: one of null, sdpa, eager"),
    ("rm", ["label_smoothing=0.5"], "label_smoothing=0.5: a number below 0.5 is expected"),
    ("rm", ["eval_fraction=1"], "eval_fraction=1.0: a number below 1.0 is expected"),
    ("rm", ["eval_fraction=0"], "eval_fraction=0.0: a number that is above 0 is expected"),
    ("rm", ["calibration_prompts=1"], "calibration_prompts=1: at least 2 is expected"),
    ("ppo", ["updates=0"], "updates=0: a number that is at least 1 is expected"),
    ("ppo", ["kl.target=0"], "kl.target=0.0: a number that is above 0 is expected"),
    ("collect", ["decoding.top_p=0"], "decoding.top_p=0.0: a number that is above 0 is expected"),
    ("sft", ["name=/x"], "name=/x: a name below runs= is expected"),
    ("sft", ["adapter=lor"], "adapter=lor: did you mean lora? choices are int8, lora, none, qlora"),
    ("sft", ["model=smolm2"], "model=smolm2: did you mean smollm2? choices are"),
    ("sft", ["model=path"], "model.path has no value: give model.path=..."),
    ("ppo", ["reward=function"], "reward.function has no value: give reward.function=..."),
    ("sft", ["tracker=tensorbord"], "tracker=tensorbord: one of tensorboard, wandb, trackio, none"),
    ("sft", ["engine.dtype=bf16"], "engine.dtype=bf16: one of auto, float32, bfloat16"),
    ("sft", ["data.on_bad_row=ignore"], "data.on_bad_row=ignore: one of stop, skip"),
    ("sft", ["batch_size=0"], "batch_size=0: a number that is at least 1 is expected"),
    ("sft", ["learning_rate=-1"], "learning_rate=-1.0: a number that is not negative is expected"),
    ("ppo", ["temperature=0"], "temperature=0.0: a number that is above 0 is expected"),
    ("ppo", ["learning_rate=nan"], "learning_rate=nan: a finite number is expected"),
    ("sft", ["learning_rate=inf"], "learning_rate=inf: a finite number is expected"),
    ("sft", ["seed=99999999999"], "seed=99999999999: at most 4294967295"),
    ("ppo", ["kl.controller=adaptive", "kl.horizon=10", "batch_size=64"], "give more than 12.8"),
    ("ppo", ["gae.lam=2"], "gae.lam=2.0: a number from 0 to 1 is expected"),
    (
        "ppo",
        ["minibatches=7", "batch_size=6"],
        "minibatches=7 of batch_size=6 episodes: give every minibatch",
    ),
    ("ppo", ["epochs=0"], "epochs=0: a number that is above 0 is expected"),
    ("ppo", ["top_k=50"], "PPO learns from log-probs of the whole distribution"),
    ("ppo", ["top_p=0.9"], "set top_k=0 and top_p=1.0"),
    ("collect", ["samples_per_prompt=1"], "samples_per_prompt=1: ranking needs at least 2"),
    ("sft", ["overwrite=true", "resume=true"], "contradict each other"),
    (
        "sft",
        ["data.demonstrations.train={pth: x}"],
        "data.demonstrations.train.pth is not a key; did you mean path?",
    ),
    ("sft", ["data.demonstrations.train={split: x}"], "path is missing"),
    ("sft", ["data.demonstrations.train=3"], "data.demonstrations.train=3: give a path"),
    ("sft", ["data.demonstrations.train=[a, 3]"], "data.demonstrations.train[1]=3: give a path"),
    (
        "sft",
        ["data.demonstrations.train=[a]", "data.demonstrations.train.limit=3"],
        "is a list; give it as a whole",
    ),
    ("sft", ["data.demonstrations.train={a: ["], "not a list or mapping"),
    (
        "ppo",
        ["reward.kind=modle"],
        "reward.kind='modle': one of model, classifier, function, rouge_l, rouge_avg, bleu, sum",
    ),
    ("ppo", ["mixer.updates=5"], "mixer.updates=5 with algo=ppo: MIXER mixes cross-entropy with"),
    (
        "ppo",
        ["algo=reinforce", "mixer.updates=5", "temperature=0.7"],
        "temperature=0.7 with mixer.updates=5: cross-entropy is that of the model's own distribution",
    ),
    (
        "ppo",
        ["algo=reinforce", "updates=4", "mixer.updates=5"],
        "mixer.updates=5 of updates=4: responses would never be all the policy's own",
    ),
    ("ppo", ["mixer.delta=0"], "mixer.delta=0: a number that is at least 1 is expected"),
    ("ppo", ["reward=rouge_l", "reward.scale=0"], "reward.scale=0: a number above 0 is expected"),
    ("ppo", ["reward=bleu", "reward.scale=ten"], "reward.scale='ten': a number above 0 is expected"),
    ("ppo", ["reward.pth=x"], "reward.pth is not a key; did you mean path?"),
    ("ppo", ["reward={kind: function}"], "reward.function is missing: kind=function needs it"),
    ("ppo", ["reward={kind: sum, parts: x}"], "reward.parts='x': give a list of scorers"),
    ("ppo", ["reward={kind: sum, parts: [{kind: model, path: x}]}"], "reward.parts[0]"),
    ("ppo", [ADVERSARIAL, "reward.learning_rate=0"], "reward.learning_rate=0: a number that is above 0 is"),
    ("ppo", [ADVERSARIAL, "reward.learning_rate=nan"], "reward.learning_rate=nan: a number that is above 0"),
    ("ppo", [ADVERSARIAL, "reward.learning_rate=fast"], "reward.learning_rate=fast: a number is expected"),
    (
        "ppo",
        [ADVERSARIAL, "reward.pretrain_updates=0"],
        "reward.pretrain_updates=0: a number that is at least",
    ),
    ("ppo", [ADVERSARIAL, "reward.steps=0"], "reward.steps=0: a number that is at least 1 is expected"),
    ("ppo", [ADVERSARIAL, "reward.steps=1.5"], "reward.steps=1.5: a whole number is expected"),
    ("ppo", [ADVERSARIAL, "reward.steps=true"], "reward.steps=True: a whole number is expected"),
    ("ppo", [ADVERSARIAL, "reward.batch_size=0"], "reward.batch_size=0: a number that is at least 1"),
    ("ppo", [ADVERSARIAL, "reward.replay=1"], "reward.replay=1: a number from 0 to below 1 is expected"),
    ("ppo", [ADVERSARIAL, "reward.replay=-0.1"], "reward.replay=-0.1: a number from 0 to below 1"),
    ("ppo", [ADVERSARIAL, "reward.replay_size=0"], "reward.replay_size=0: a number that is at least 1"),
    ("ppo", [ADVERSARIAL, "reward.replay_rate=1"], "reward.replay_rate is not a key; did you mean replay"),
    ("ppo", ["reward={kind: discriminator}"], "reward.learning_rate is missing: kind=discriminator needs it"),
    ("ppo", [ADVERSARIAL, "eval_every=5"], "eval_every=5 with reward=discriminator: it is another judge"),
    (
        "ppo",
        ["reward={kind: sum, parts: [{weight: 1, kind: discriminator}]}"],
        "reward.parts[0].kind=discriminator: it is trained in stage=ppo, as the whole reward",
    ),
    ("evaluate", [ADVERSARIAL], "reward.kind=discriminator: it is trained in stage=ppo"),
    ("evaluate", [ADVERSARIAL, "proxy=null"], "here give {kind: model, path: <run>/ppo/discriminator}"),
    ("evaluate", ["gold={kind: discriminator}"], "gold.kind=discriminator: it is trained in stage=ppo"),
    (
        "collect",
        ["labeller={kind: discriminator}"],
        "labeller.kind=discriminator: it is trained in stage=ppo",
    ),
    ("collect", [ADVERSARIAL], "reward is not a key of stage collect, but of ppo, evaluate"),
    ("evaluate", ["systems={}"], "systems={}: give at least one"),
    ("evaluate", ["systems={a: 3}"], "systems.a=3: give a path"),
    (
        "evaluate",
        ["systems={a: {path: x, bestof: 3}}"],
        "systems.a.bestof is not a key; did you mean best_of?",
    ),
    ("evaluate", ["systems={a: {path: x, decoding: {temp: 3}}}"], "did you mean temperature?"),
    ("evaluate", ["systems={a: {path: x, best_of: 0}}"], "systems.a.best_of=0: a number of samples"),
    (
        "evaluate",
        ["systems={a: {path: x, best_of: [4, 4]}}"],
        "systems.a.best_of=[4, 4]: a number of samples",
    ),
    ("evaluate", ["systems={a: {path: x, checkpoints: y}}"], "{checkpoints: folder of a PPO run}"),
    (
        "evaluate",
        ["systems={a: {path: x, best_of: [2, 4]}}", "baseline=a"],
        "baseline=a: not one of the systems a_2, a_4",
    ),
    (
        "evaluate",
        ["systems={a: x, p: {checkpoints: y}}", "gate=kl(p_x)<1 and kl(q_8)<1"],
        "gate=kl(q_8)<1: systems are a, p",
    ),
    ("evaluate", ["systems={a: x, p: {checkpoints: y}}", "baseline=q_8"], "baseline=q_8: not one of the"),
    ("ppo", ["keep_every=0"], "keep_every=0: a number that is at least 1 is expected"),
    ("evaluate", ["oracle="], "oracle= is empty"),
    ("evaluate", ["prefix_lengths=8"], "prefix_lengths=8: a list of whole numbers is expected"),
    ("evaluate", ["prefix_lengths=[4, 2.5]"], "prefix_lengths=[4, 2.5]: a list of whole numbers is expected"),
    (
        "evaluate",
        ["prefix_lengths=[4, 0]"],
        "prefix_lengths=[4, 0]: give lengths of at least 1 token, or null",
    ),
    ("evaluate", ["prefix_lengths=[]"], "prefix_lengths=[]: give lengths of at least 1 token, or null"),
    ("evaluate", ["baseline=sftt"], "baseline=sftt: not one of the systems"),
    ("sft", ["exposure=schedule"], "exposure=schedule: did you mean scheduled_sampling? choices are none"),
    ("sft", ["exposure.end=0.5"], "exposure.end=0.5 with exposure=none: give exposure=scheduled_sampling"),
    (
        "sft",
        [SCHEDULED, "exposure.schedule=cosine"],
        "exposure.schedule=cosine: one of null, linear, exponential",
    ),
    ("sft", [SCHEDULED, "exposure.schedule=null"], "exposure.schedule=null: leave it out"),
    (
        "sft",
        [SCHEDULED, "exposure.replacement=beam"],
        "exposure.replacement=beam: one of null, sample, argmax",
    ),
    ("evaluate", ["systems={a/b: tiny}"], "systems.a/b: a name of letters, digits and . + - _ is expected"),
    ("sft", [SCHEDULED, "exposure.end=2"], "exposure.end=2.0: a number from 0 to 1 is expected"),
    ("sft", [SCHEDULED, "exposure.passes=0"], "exposure.passes=0: a number that is at least 1 is expected"),
    ("sft", [SCHEDULED, "exposure.k=0"], "exposure.k=0.0: a number that is above 0 is expected"),
    ("sft", [SCHEDULED, "exposure.schedule=exponential", "exposure.end=0"], "or exposure.k"),
    ("sft", [SCHEDULED, "exposure.schedule=exponential", "exposure.k=2"], "k^i needs at most 1"),
    (
        "ppo",
        ["decoding=beam"],
        "but of collect, evaluate, chat. Rollouts are drawn from the model's own distribution",
    ),
    ("ppo", ["decoding.repetition_penalty=1.2"], "penalties, truncation and beams would change it"),
    ("ppo", ["min_p=0.1"], "penalties, truncation and beams would change it"),
    ("collect", ["decoding=greedy"], "decoding=greedy draws nothing: all samples of a prompt would be equal"),
    (
        "collect",
        ["decoding=beam", "samples_per_prompt=5"],
        "samples_per_prompt=5 of decoding.num_beams=4: a search has no more responses than beams",
    ),
    ("evaluate", ["decoding=beam", "decoding.temperature=0.5"], "decoding.temperature=0.5 with num_beams=4"),
    ("evaluate", ["decoding=greedy", "decoding.min_p=0.5"], "decoding.min_p=0.5 with greedy=true"),
    ("evaluate", ["decoding=greedy", "decoding.num_beams=2"], "decoding.num_beams=2 with greedy=true"),
    ("evaluate", ["decoding.length_penalty=2"], "decoding.length_penalty=2.0 is for beams"),
    ("evaluate", ["systems={a: {path: x, decoding: beam}}"], "systems.a.decoding='beam': give its keys"),
    (
        "evaluate",
        ["systems={a: {path: x, decoding: {num_beams: 2.5}}}"],
        "systems.a.decoding.num_beams=2.5: a value of type int is expected",
    ),
    (
        "evaluate",
        ["systems={a: {path: x, decoding: {num_beams: 4, top_k: 3}}}"],
        "systems.a.decoding.top_k=3 with num_beams=4, which draws nothing: set top_k=0",
    ),
    ("evaluate", ["systems={a: {path: x, decoding: {name: beam}}}"], "systems.a.decoding.name is not a key"),
    ("collect", ["decoding=beams"], "decoding=beams: did you mean beam? choices are beam, beam_penalised"),
    (
        "collect",
        ["decoding=beam", "decoding.num_beams=0"],
        "decoding.num_beams=0: a number that is at least 1",
    ),
    ("collect", ["decoding.penalty_scope=prompt"], "decoding.penalty_scope=prompt: one of response, all"),
    ("collect", ["decoding.min_p=2"], "decoding.min_p=2.0: a number from 0 to 1 is expected"),
    ("ppo", ["exposure=scheduled_sampling"], "exposure is not a key of stage ppo, but of sft"),
    (
        "ppo",
        ["engine=zero2", "engine.deepspeed.communication_data_type=fp16"],
        'communication_data_type="fp16" contradicts the type in which gradients travel="fp32": leave it out',
    ),
    (
        "ppo",
        ["engine.micro_batch_size=0"],
        "engine.micro_batch_size=0: a number that is at least 1 is expected",
    ),
    ("sft", ["engine.threads=0"], "engine.threads=0: a number that is at least 1 is expected"),
    ("ppo", ["engine=zero3", f"{ZERO}.zero_quantized_weights=true"], "zero_quantized_weights=true is not"),
    ("ppo", ["engine=zero2", f"{ZERO}.reduce_bucket_size=0"], "reduce_bucket_size=0: a whole number above 0"),
    ("ppo", ["engine=zero2", f"{ZERO}=null"], "zero_optimization.stage=1, 2 or 3 is expected; leave it to"),
    ("ppo", ["engine=zero2", "engine.deepspeed=3"], "engine.deepspeed=3: zero_optimization.stage=1, 2 or 3"),
    ("sft", ["name=${nope}"], "name: Interpolation key 'nope' not found"),
    ("sfr", [], "stage=sfr: did you mean sft?"),
]


@pytest.mark.parametrize(("stage", "words", "message"), MISTAKES)
def test_a_mistake_is_answered_with_key_value_and_remedy(stage: str, words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_config(stage, words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_saved_configuration_with_other_keys_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old_key: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml is not a configuration of stage sft: old_key"):
        read_config("sft", path)


def test_a_key_goes_to_every_stage_that_has_it_and_a_stages_key_to_that_stage() -> None:
    taken = split_overrides(["seed=2", "kl.coef=0.1", "sft.learning_rate=1", "samples_per_prompt=3"])
    assert taken == {
        "sft": ["seed=2", "sft.learning_rate=1"],
        "collect": ["seed=2", "samples_per_prompt=3"],
        "rm": ["seed=2"],
        "ppo": ["seed=2", "kl.coef=0.1"],
        "evaluate": ["seed=2"],
    }
    assert load_config("sft", taken["sft"]).learning_rate == 1.0
    with pytest.raises(ValueError, match=r"kl\.coeff is not a key of any stage; did you mean kl\.coef\?"):
        split_overrides(["kl.coeff=1"])


def test_nothing_is_guessed_from_afar() -> None:
    assert nearest("zzz", all_keys("sft")) is None


LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "tie_word_embeddings": True,
}
# a layer: q, o 4x4 and k, v 4x2 are 48, three 4x8 are 96; two layers 288; one embedding 10x4 = 40
GPT2 = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 2, "n_head": 2, "n_positions": 5}
# a layer: four 4x4 are 64, two 4x16 are 128; two layers 384; embedding 40, positions 20
NEOX = {**LLAMA, "model_type": "gpt_neox", "num_key_value_heads": None, "tie_word_embeddings": False}
# a layer: four 4x4 are 64, two 4x8 are 64; two layers 256; two embeddings 80


@pytest.mark.parametrize(
    ("config", "parameters"), [(LLAMA, 328), (GPT2, 444), (NEOX, 336), ({"text_config": LLAMA}, 328)]
)
def test_parameters_are_counted_from_the_config_alone(config: dict, parameters: int) -> None:
    shape = estimate.read_shape(config)
    assert shape is not None
    assert shape.parameters == parameters


def test_a_config_without_sizes_is_not_guessed() -> None:
    assert estimate.read_shape({"model_type": "unheard_of"}) is None


def test_lora_parameters_by_hand() -> None:
    shape = estimate.read_shape(LLAMA)
    assert shape is not None
    # a layer and rank: q, o 4+4 each, k, v 4+2 each, three times 4+8: 16 + 12 + 36 = 64
    assert shape.lora_parameters(3) == 2 * 3 * 64


def memory_of(*words: str, model: dict[str, Any] = estimate.SMOLLM2, device: str = "cpu") -> estimate.Memory:
    config = load_config("ppo", [f"engine.device={device}", *words])
    shape = estimate.read_shape(model)
    assert shape is not None
    return estimate.memory("ppo", config, shape)


def memory_parts(*words: str) -> dict[str, float]:
    return dict(part for phase in memory_of(*words)[:3] for part in phase.items())


def test_activations_are_those_of_the_passes_held_at_a_time() -> None:
    passes = ["engine.tokens_per_pass=100", "engine.workers=2", "engine.dtype=float32", "minibatches=1"]
    lengths = ["data.max_prompt_tokens=30", "data.max_response_tokens=20", "batch_size=64"]
    none_kept = memory_parts(*passes, *lengths, "engine.kept_tokens=0")["activations"]
    # a token and layer of SmolLM2: twice the widths of states, queries, keys and the gate
    assert none_kept == 2 * 100 * 30 * 2 * (576 + 576 + 192 + 1536) * 4
    assert memory_parts(*passes, *lengths, "engine.kept_tokens=200")["activations"] == 2 * none_kept
    every = memory_parts(*passes, *lengths, "engine.kept_tokens=9999999")["activations"]
    assert every == none_kept / 200 * 64 * 50


def test_the_estimate_shrinks_with_adapters_and_bits_and_admits_what_it_cannot_know() -> None:
    def memory(*words: str) -> float:
        return memory_of(*words).most

    assert memory("adapter=qlora") < memory("adapter=int8") < memory("adapter=lora") < memory("adapter=none")
    several = ["adapter=none", "num_processes=4"]
    engines = [
        memory_parts(*several, f"engine={name}")["trained weights"] for name in ("zero2", "zero1", "ddp")
    ]
    # per weight, of which policy and critic train 134.5 million each: 4 + 16/4, 8 + 12/4 and 16 bytes
    trained = 2 * 134_479_872
    assert [size - engines[0] for size in engines] == [0, trained * 3, trained * 8]
    lines = estimate.estimate("sft", load_config("sft", ["model=nobody/has-this"]))
    assert "memory is unknown" in lines[0]
    assert estimate.find_config("random_1b") is not None, "known before it is made"
    assert "unknown kind" not in lines[0]


@pytest.mark.parametrize(("adapter", "held"), [("none", 44.87), ("lora", 5.46)])
def test_the_estimate_is_what_a_gpu_held(adapter: str, held: float) -> None:
    # stage=bench model=random_1b adapters=[lora,none] on one NVIDIA H200, bfloat16: GiB that PPO held at most
    words = [f"adapter={adapter}", "engine.dtype=bfloat16", "batch_size=32", "minibatches=1"]
    words += ["data.max_prompt_tokens=48", "data.max_response_tokens=32"]
    found = memory_of(*words, model=estimate.KNOWN["random_1b"], device="cuda")
    assert found.most / 2**30 == pytest.approx(held, rel=0.08)


def test_a_rollout_with_adapters_holds_their_product_merged_and_no_activations() -> None:
    found = memory_of("adapter=lora", "engine.dtype=float32")
    assert found.sampling["merged weights"] == 4 * 106_168_320  # those of SmolLM2's linear layers
    sampling, learning = sum(found.sampling.values()), sum(found.learning.values())
    assert found.most == sum(found.held.values()) + max(sampling, learning)
    assert "merged weights" not in memory_parts("adapter=qlora"), "4 bits keep the adapter beside them"


def test_what_is_offloaded_lies_in_the_processors_memory_where_there_is_a_gpu() -> None:
    def trained(engine: str, device: str = "cuda") -> list[float]:
        words = ["adapter=none", "num_processes=2", f"engine={engine}"]
        found = memory_of(*words, device=device)
        sizes = (found.held["trained weights"], found.offloaded.get("trained weights", 0.0))
        return [size / (2 * 134_479_872) for size in sizes]

    # bytes per weight of policy and critic, in each of two processes
    assert trained("zero2") == [4 + 16 / 2, 0]
    assert trained("zero2_offload") == pytest.approx([4, 16 / 2])
    assert trained("zero3") == [20 / 2, 0]
    assert trained("zero3_offload") == [0, 20 / 2]
    with_lora = memory_of("adapter=lora", "num_processes=2", "engine=zero3_offload", device="cuda")
    # of adapters, which every process has whole, the weights themselves stay
    assert with_lora.held["trained weights"] == pytest.approx(with_lora.offloaded["trained weights"] / 2)
    assert with_lora.held["frozen weights"] == 0 < with_lora.offloaded["frozen weights"]
    assert trained("zero3_offload", device="cpu") == [20 / 2, 0], "the processor's memory is all there is"


def test_passes_of_full_weights_hold_gradients_of_their_own() -> None:
    words = ["adapter=none", "minibatches=1", "engine.tokens_per_pass=100", "data.max_prompt_tokens=30"]
    words += ["data.max_response_tokens=20"]

    def sets(workers: int, batch_size: int) -> float:
        more = [f"engine.workers={workers}", f"batch_size={batch_size}"]
        return memory_parts(*words, *more).get("gradients of passes", 0) / (4 * 134_479_872)

    # one is counted with the trained weights; where several passes follow one another each has its own beside
    assert [sets(1, 2), sets(1, 4), sets(2, 4), sets(2, 8)] == [0, 1, 1, 3]


def test_ppo_work_counts_every_pass() -> None:
    words = [
        "updates=3",
        "batch_size=2",
        "epochs=1",
        "data.max_prompt_tokens=4",
        "data.max_response_tokens=6",
    ]
    # 1 sampling + 4 scoring + 6 learning passes over 3 x 2 episodes of 10 tokens
    assert estimate.tokens_to_process("ppo", load_config("ppo", words)) == 11 * 60


def test_a_discriminator_counts_as_a_third_trained_model_and_by_its_passes() -> None:
    for adapter in ("none", "lora"):
        words = [f"adapter={adapter}", "engine.dtype=float32"]
        plain, adversarial = (memory_parts(*words, more) for more in ("reward=model", "reward=discriminator"))
        assert adversarial["trained weights"] == 1.5 * plain["trained weights"]
        frozen = 0.5 if adapter == "none" else 1  # instead of a reward model of its own
        assert adversarial["frozen weights"] == frozen * plain["frozen weights"]
    words = [
        "updates=3",
        "batch_size=2",
        "epochs=1",
        "data.max_prompt_tokens=4",
        "data.max_response_tokens=6",
    ]
    own = ["pretrain_updates=5", "steps=2", "batch_size=7"]
    words += ["reward=discriminator", *(f"reward.{word}" for word in own)]
    # beside 11 passes over 6 episodes: 5 x 7 sampled; 5 + 3 x 2 steps on 14 rows, 3 passes each; 6 + 6 judged
    assert estimate.tokens_to_process("ppo", load_config("ppo", words)) == 10 * (66 + 35 + 462 + 12)


def test_configuration_loads_no_heavy_library() -> None:
    program = (
        "import sys, rlhf.estimate, stages.show; from rlhf.config import load_config; load_config('ppo', []);"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_DIR, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
