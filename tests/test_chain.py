"""The whole chain on the tiny model, run stage by stage as the command line does: what it leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhf.config import PROJECT_DIR, read_config
from rlhf.files import hash_path
from tests.stage_runs import (
    SMALL,
    STAGES,
    read_json,
    read_lines,
    run_chain,
    run_stage,
    same_results,
    scorer_of,
)

pytestmark = pytest.mark.slow
KINDS = dict(zip(STAGES, ("policy", "records", "reward_model", "policy", "report"), strict=True))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_what_it_is_and_from_what_it_came(tiny_run: Path, stage: str) -> None:
    folder = tiny_run / stage
    record = read_json(folder / "stage.json")
    assert (record["stage"], record["kind"]) == (stage, KINDS[stage])
    assert {"torch", "transformers", "python"} <= record["versions"].keys()
    assert record["parents"]
    for parent in record["parents"]:
        path = Path(parent["path"])
        assert parent["sha256"] == hash_path(path)
    for check in record["checks"]:
        assert check.keys() == {"name", "passed", "value", "meaning"}
    assert bool(record["checks"]) == (stage != "evaluate")
    assert read_config(stage, folder / "config.yaml").name == tiny_run.name
    assert not (folder / "state").exists()


def test_parents_are_the_stages_before(tiny_run: Path) -> None:
    def parents(stage: str) -> dict[str, str]:
        found = read_json(tiny_run / stage / "stage.json")["parents"]
        return {parent["key"]: parent["path"].removeprefix(f"{tiny_run}/") for parent in found}

    assert parents("collect") == {"policy": "sft/model"}
    assert parents("rm") == {
        "base": "sft/model",
        "ranked.train": "collect/ranked.jsonl",
        "calibration_policy": "sft/model",
    }
    assert parents("ppo") == {"policy": "sft/model", "critic": "rm/model", "reward.path": "rm/model"}
    assert parents("evaluate")["systems.ppo"] == "ppo/model"


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_metrics_are_finite_numbers_by_step(tiny_run: Path, stage: str) -> None:
    rows = read_lines(tiny_run / stage / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps) and len(rows) >= 3
    values = [value for row in rows for value in row.values()]
    assert all(isinstance(value, int | float) and abs(value) < float("inf") for value in values)
    # wall-clock times would make two equal runs differ
    assert not [name for name in rows[-1] if "second" in name or "time" in name]


def test_sft_lowers_the_held_out_loss_and_ppo_starts_at_its_reference(tiny_run: Path) -> None:
    results = read_json(tiny_run / "sft" / "stage.json")["results"]
    assert results["loss"] < results["base_loss"] - 1
    losses = [
        row["eval_loss"] for row in read_lines(tiny_run / "sft" / "metrics.jsonl") if "eval_loss" in row
    ]
    assert losses == [results["base_loss"], results["loss"]]
    first, *later = read_lines(tiny_run / "ppo" / "metrics.jsonl")
    assert abs(first["kl"]) < 1e-4 and abs(first["first_ratio"] - 1) < 1e-5
    assert max(row["kl"] for row in later) > 0.01
    assert all(abs(row["first_ratio"] - 1) < 1e-5 for row in later)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_policy_loads_with_plain_transformers_and_generates(tiny_run: Path, stage: str) -> None:
    folder = tiny_run / stage / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("the soup was", return_tensors="pt")
    torch.manual_seed(1)
    new = model.generate(**prompt, max_new_tokens=26, do_sample=True, pad_token_id=tokenizer.pad_token_id)
    response = new[0, prompt["input_ids"].shape[1] :]
    assert 1 <= len(response) <= 26
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "base_model" not in card  # which would be a name on the hub
    began = read_json(tiny_run / "sft" / "stage.json")["parents"][0]["path"]
    assert f"| began with | {began} |" in card and "| data | toy |" in card and "| seed | 1 |" in card
    for parent in read_json(folder.parent / "stage.json")["parents"]:
        assert f"| made from: {parent['key']} | `{parent['path']}`, SHA-256 {parent['sha256']} |" in card


def test_plain_transformers_gives_the_reward_models_scores(tiny_run: Path) -> None:
    folder = tiny_run / "rm" / "model"
    scorer = scorer_of(folder)
    records = read_lines(tiny_run / "collect" / "ranked.jsonl")[:8]
    prompts = [record["prompt"] for record in records for _ in record["responses"]]
    responses = [response for record in records for response in record["responses"]]
    ours = torch.tensor(scorer(prompts, responses))

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    rows = [
        scorer.codec.encode_prompt(prompt) + scorer.codec.encode_response(response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    assert {row[-1] for row in rows} == {tokenizer.eos_token_id}
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert (ours - theirs).abs().max() < 1e-5
    assert ours.std() > 0.1


def test_scores_of_the_sft_policys_samples_have_mean_0_and_variance_1(tiny_run: Path) -> None:
    from rlhf.records import RankedList
    from rlhf.rm import TokenizedLists, calibration_rows

    scorer = scorer_of(tiny_run / "rm" / "model")
    config = read_config("rm", tiny_run / "rm" / "config.yaml")
    assert config.calibration_policy == str(tiny_run / "sft" / "model")
    lists = [
        RankedList(prompt, (" a.", " b."), (1, 2)) for prompt in ("the soup was", "my dog is", "his bed")
    ]
    held_out = TokenizedLists([], lists, 0, 0)
    # the prompts here are not those of the run, so mean and variance are only near 0 and 1 ...
    rows = calibration_rows(config, scorer.codec, scorer.engine, held_out)
    scores = torch.tensor(scorer.score_tokens(rows))
    assert len(rows) == config.calibration_prompts and abs(scores.mean()) < 1 and 0.1 < scores.std() < 3
    # ... and the record says what they were before
    assert read_json(tiny_run / "rm" / "stage.json")["normalisation"]["correlation"] > 0.5


def test_report_has_what_scripts_read(tiny_run: Path) -> None:
    report = read_json(tiny_run / "evaluate" / "report.json")
    names = ["base", "sft", "sft_repetition_penalty", "best_of_4", "best_of_16", "ppo"]
    assert list(report["systems"]) == names and report["baseline"] == "sft"
    for name, entry in report["systems"].items():
        for judge in ("gold", "proxy"):
            assert entry[judge]["low"] <= entry[judge]["mean"] <= entry[judge]["high"], name
        assert entry["length"] > 0 and 0 <= entry["rep_4"] <= 1
        assert entry["kl_is_bound"] == name.startswith("best_of")
    assert abs(report["systems"]["sft"]["kl"]) < 1e-4  # its own reference
    assert report["systems"]["base"]["kl"] > 10
    keys = {"a", "b", "judge", "wins", "ties", "losses", "win_rate", "low", "high", "length_controlled"}
    assert all(rate.keys() == keys for rate in report["win_rates"])
    judged = {(rate["a"], rate["b"], rate["judge"]) for rate in report["win_rates"]}
    others = [name for name in names if name != "sft"]
    assert judged == {(name, "sft", judge) for name in others for judge in ("gold", "proxy")}
    for rate in report["win_rates"]:
        assert rate["wins"] + rate["ties"] + rate["losses"] == report["num_prompts"]
    # the best of four by the proxy beats one sample by the proxy
    proxies = [report["systems"][name]["proxy"]["mean"] for name in ("sft", "best_of_4", "best_of_16")]
    assert proxies == sorted(set(proxies))


def test_every_system_has_its_measures_of_exposure_bias(tiny_run: Path) -> None:
    report = read_json(tiny_run / "evaluate" / "report.json")
    few = "no MAUVE: 16 prompts have a reference, fewer than 200"
    assert report["notes"] == [few, "no excess error, being the oracle itself (0 / 0): base"]
    length = report["excess_error_length"]
    for name, entry in report["systems"].items():
        found = entry["exposure"]
        estimates = [*found["seq_rep"].values(), *found["distinct"].values(), found["diversity"]]
        for each in [*estimates, found["perplexity"]]:
            assert each["low"] <= each["mean"] <= each["high"], name
        assert found["seq_rep"]["4"]["mean"] == pytest.approx(entry["rep_4"])
        assert found["distinct"]["2"]["mean"] == entry["distinct_2"]
        lengths = [each["length"] for each in found["excess_error"]]
        assert lengths == ([] if name == "base" else list(range(1, len(lengths) + 1)))
        assert name == "base" or length in lengths
        prefixes = {each["length"]: each for each in found["prefix_quality"]}
        assert list(prefixes) == ([] if name.startswith("best_of") else [4, 16])
        for each in prefixes.values():
            for kind in ("logprob", "score"):
                quality = each[kind]
                assert quality["mean"] == pytest.approx(quality["gold"] - quality["own"])
                assert quality["low"] <= quality["mean"] <= quality["high"]
                assert 10 <= quality["rows"] <= report["num_prompts"]


def test_report_can_be_read_and_its_plots_are_pictures(tiny_run: Path) -> None:
    text = (tiny_run / "evaluate" / "report.md").read_text(encoding="utf-8")
    for name in ("scores", "diversity", "excess_error", "training"):
        name = f"plots/{name}.png"
        assert f"]({name})" in text
        picture = (tiny_run / "evaluate" / name).read_bytes()
        assert picture.startswith(PNG) and len(picture) > 5000
    assert "simulated" in text
    commands = [line.strip() for line in text.splitlines() if line.startswith("    ./launch.sh")]
    assert [command.split()[1] for command in commands] == [f"stage={stage}" for stage in STAGES]
    assert all(f"name={tiny_run.name}" in command for command in commands)


def test_a_finished_stage_stops_and_overwrite_runs_it_again(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("ppo", "evaluate"))
    words = [f"runs={tmp_path}", *SMALL["collect"]]
    command = [sys.executable, str(PROJECT_DIR / "stages" / "__main__.py"), "stage=collect", *words]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert "overwrite=true" in again.stderr and str(run / "collect") in again.stderr
    assert "Traceback" not in again.stderr
    before = (run / "collect" / "ranked.jsonl").read_bytes()
    other = run_stage("collect", *words, "seed=2", "overwrite=true", f"policy={tiny_run}/sft/model")
    assert other.status == 0, other.output
    assert (run / "collect" / "ranked.jsonl").read_bytes() != before


@pytest.mark.parametrize("stage", ["sft", "collect", "rm", "ppo"])
def test_the_same_seed_gives_the_same_numbers_and_weights(tiny_run: Path, tmp_path: Path, stage: str) -> None:
    run = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("evaluate"))
    again = run_stage(stage, f"runs={run.parent}", *SMALL[stage], "overwrite=true", "force=true")
    assert again.status == 0, again.output
    assert same_results(run / stage, tiny_run / stage)


def test_two_models_alone_are_compared_without_a_reward_model(tiny_run: Path, tmp_path: Path) -> None:
    mine, theirs = tiny_run / "sft" / "model", tiny_run / "ppo" / "model"
    result = run_stage(
        *(
            "evaluate",
            "model=tiny",
            "data=toy",
            f"runs={tmp_path / 'runs'}",
            "num_prompts=8",
            "bootstrap=100",
            "oracle=null",
            "prefix_lengths=null",
        ),
        *("tracker=none", f"systems={{mine: '{mine}', theirs: '{theirs}'}}"),
    )
    assert result.status == 0, result.output
    (report,) = (tmp_path / "runs").glob("*/evaluate/report.json")
    found = read_json(report)
    measured = found["systems"]["mine"]["exposure"]
    assert (found["oracle"], found["notes"]) == (None, []) and "exposure bias" not in result.output
    assert measured["perplexity"] is None and measured["excess_error"] == measured["prefix_quality"] == []
    assert found["baseline"] == "mine" and found["systems"]["mine"]["proxy"] is None
    assert {(rate["a"], rate["b"], rate["judge"]) for rate in found["win_rates"]} == {
        ("theirs", "mine", "gold")
    }


def test_policies_kept_on_the_way_change_nothing_and_make_a_curve(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("evaluate", "ppo"))
    words = [f"runs={run.parent}", "force=true"]
    kept = run_stage("ppo", *SMALL["ppo"], *words, "keep_every=2")
    assert kept.status == 0, kept.output
    assert same_results(run / "ppo", tiny_run / "ppo")
    products = read_json(run / "ppo" / "stage.json")["products"]
    assert list(products) == ["update_2", "update_4"]
    assert all(hash_path(run / "ppo" / name) == product["sha256"] for name, product in products.items())

    systems = f"systems={{sft: '{run}/sft/model', ppo: {{checkpoints: '{run}/ppo'}}, "
    systems += f"best: {{path: '{run}/sft/model', best_of: [1, 2, 4, 3]}}}}"
    measured = run_stage("evaluate", *SMALL["evaluate"], *words, systems, "oracle=null", "gate=kl(ppo_2)<99")
    assert measured.status == 0, measured.output
    report = read_json(run / "evaluate" / "report.json")
    assert list(report["systems"]) == ["sft", "ppo_2", "ppo_4", "ppo", "best_1", "best_2", "best_3", "best_4"]
    curves = report["overoptimization"]
    assert [point["update"] for point in curves["ppo"]["points"]] == [2, 4, 6]
    proxies = [point["proxy"]["mean"] for point in curves["best"]["points"]]
    assert proxies == sorted(proxies), "of one pool, the best of more is never worse"
    assert curves["best"]["fit"] is not None and curves["ppo"]["fit"] is not None
    parents = {parent["path"] for parent in read_json(run / "evaluate" / "stage.json")["parents"]}
    assert {f"{run}/ppo/update_2", f"{run}/ppo/update_4", f"{run}/ppo/model"} <= parents
    for file in ("report.md", "report.html"):
        assert "Over-optimisation" in (run / "evaluate" / file).read_text(encoding="utf-8")
    assert (run / "evaluate" / "plots" / "overoptimization.png").exists()

    again = [*words, systems, "oracle=null", "gate=kl(ppo_2)<0", "resume=true"]
    failed = run_stage("evaluate", *SMALL["evaluate"], *again)
    assert failed.status == 4, "another condition on what is finished"
    changed = run_stage("evaluate", *SMALL["evaluate"], *again, "seed=9")
    assert changed.status == 2 and "with other settings: seed (1 -> 9)" in changed.error

    nobody = run_stage("evaluate", *SMALL["evaluate"], *words, systems, "gate=kl(ppo_3)<99", "overwrite=true")
    assert nobody.error.endswith("systems are sft, ppo_2, ppo_4, ppo, best_1, best_2, best_3, best_4")
    other = f"systems={{sft: '{run}/sft/model', ppo: {{checkpoints: '{tiny_run}/ppo'}}}}"
    none_kept = run_stage("evaluate", *SMALL["evaluate"], *words, other, "overwrite=true")
    assert "systems.ppo.checkpoints=" in none_kept.error
    assert none_kept.error.endswith("that run has no checkpoints; run it again with keep_every=<updates>")
    no_run = run_stage(
        "evaluate", *SMALL["evaluate"], *words, "systems={a: {checkpoints: /nowhere}}", "overwrite=true"
    )
    assert "systems.a.checkpoints=/nowhere: no finished run of stage=ppo lies there" in no_run.error


def test_evaluation_prompts_that_any_stage_trained_on_are_counted(tiny_run: Path, tmp_path: Path) -> None:
    assert read_json(tiny_run / "evaluate" / "report.json")["seen_prompts"] == 0
    overlap = read_json(tiny_run / "evaluate" / "report.json")["overlap"]
    assert [(Path(each["stage"]).name, each["key"], each["shared"]) for each in overlap] == [
        ("sft", "data.demonstrations.train", 0),
        ("collect", "data.prompts.collect", 0),
        ("rm", "ranked.train", 0),
        ("ppo", "data.prompts.ppo", 0),
    ]
    run = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("evaluate"))
    (run / "ppo" / "trained_prompts.json").unlink()
    prompts = tmp_path / "prompts.jsonl"
    seen = [json.loads(line)["prompt"] for line in (run / "collect" / "ranked.jsonl").open(encoding="utf-8")][
        :5
    ]
    rows = [*dict.fromkeys(seen), "nobody ever saw this", "nor that"]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows), encoding="utf-8")
    words = [f"runs={run.parent}", "force=true", f"data.prompts.evaluate={prompts}", "oracle=null"]
    result = run_stage("evaluate", *SMALL["evaluate"], *words, f"systems={{ppo: '{run}/ppo/model'}}")
    assert result.status == 0, result.output
    report = read_json(run / "evaluate" / "report.json")
    found = {(Path(each["stage"]).name, each["key"]): each["shared"] for each in report["overlap"]}
    assert report["seen_prompts"] == len(rows) - 2 == found["rm", "ranked.train"]
    assert found["collect", "data.prompts.collect"] == len(rows) - 2 and found["ppo", ""] is None
    count = f"trained on: {len(rows) - 2} of these prompts stand in ranked.train of"
    assert count in result.output and "not known which prompts were trained on by: " in result.output
    text = (run / "evaluate" / "report.md").read_text(encoding="utf-8")
    assert f"{len(rows)} prompts, {len(rows) - 2} of them trained on" in text and "unseen" not in text


def test_a_policy_that_ppo_did_not_write_has_no_training_curve(tiny_run: Path, tmp_path: Path) -> None:
    result = run_stage(
        *(
            "evaluate",
            "model=tiny",
            "data=toy",
            f"runs={tmp_path / 'runs'}",
            "num_prompts=4",
            "bootstrap=100",
        ),
        *("tracker=none", f"systems={{only: '{tiny_run / 'sft' / 'model'}'}}"),
    )
    assert result.status == 0, result.output
    assert "only alone" in result.output
    (plots,) = (tmp_path / "runs").glob("*/evaluate/plots")
    assert {path.name for path in plots.iterdir()} == {"scores.png", "diversity.png"}


def test_lora_keeps_the_adapter_and_merges_it(tmp_path: Path) -> None:
    from peft import PeftModel

    run = run_chain(tmp_path, "adapter=lora", "adapter.r=4", stages=("sft", "collect", "rm", "ppo"))
    prompt = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    for stage, base in (("sft", None), ("ppo", run / "sft" / "model"), ("rm", run / "sft" / "model")):
        folder = run / stage
        path = base or read_json(folder / "stage.json")["parents"][0]["path"]
        auto: Any = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
        plain = auto.from_pretrained(path, **({"num_labels": 1} if stage == "rm" else {}))
        with_adapter: Any = PeftModel.from_pretrained(plain, folder / "adapter").eval()
        merged = auto.from_pretrained(folder / "model").eval()
        if stage == "rm":
            # the stored head is the adapter's head, normalised: the trunks must agree
            outputs = [m(prompt)[0] for m in (with_adapter.get_base_model().transformer, merged.transformer)]
        else:
            outputs = [m(prompt).logits for m in (with_adapter, merged)]
        assert (outputs[0] - outputs[1]).abs().max() < 1e-5, stage
        with with_adapter.disable_adapter():
            without = with_adapter.get_base_model().transformer(prompt)[0]
        assert (merged.transformer(prompt)[0] - without).abs().max() > 1e-4, stage


@pytest.mark.parametrize(
    ("adapter", "stages"), [("qlora", ("sft", "collect", "rm", "ppo")), ("int8", ("sft",))]
)
def test_quantized_bases_train(tmp_path: Path, adapter: str, stages: tuple[str, ...]) -> None:
    run = run_chain(tmp_path, f"adapter={adapter}", "adapter.r=4", stages=stages)
    loss = read_json(run / "sft" / "stage.json")["results"]
    assert loss["loss"] < loss["base_loss"]
    for stage in {"sft", "rm", "ppo"} & set(stages):
        config = read_json(run / stage / "model" / "config.json")
        assert "quantization_config" not in config  # the merged model is plain
        # B starts at 0: a layer whose B is still 0 never saw a gradient
        weights = load_file(run / stage / "adapter" / "adapter_model.safetensors")
        learned = {name: bool(weight.any()) for name, weight in weights.items() if "lora_B" in name}
        assert learned and all(learned.values()), (stage, learned)
    if "ppo" in stages:
        first = read_lines(run / "ppo" / "metrics.jsonl")[0]
        assert abs(first["kl"]) < 1e-4


def test_the_reward_can_be_a_function_or_a_sum(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("evaluate", "ppo"))
    file = tmp_path / "taste.py"
    file.write_text("def shorter(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n")
    words = [f"runs={run.parent}", *SMALL["ppo"], "force=true", "overwrite=true"]
    shorter = run_stage("ppo", *words, "reward=function", f"reward.function={file}:shorter")
    assert shorter.status == 0, shorter.output
    rows = read_lines(run / "ppo" / "metrics.jsonl")
    assert rows[-1]["length"] < rows[0]["length"] and rows[0]["score"] < 0
    parents = read_json(run / "ppo" / "stage.json")["parents"]
    assert [parent["key"] for parent in parents] == ["policy", "critic"]

    parts = (
        f"[{{weight: 1, kind: model, path: '{run}/rm/model'}}, "
        f"{{weight: 2, kind: function, function: '{file}:shorter'}}]"
    )
    both = run_stage("ppo", *words, "reward=sum", f"reward.parts={parts}", "updates=2")
    assert both.status == 0, both.output
    keys = [parent["key"] for parent in read_json(run / "ppo" / "stage.json")["parents"]]
    assert keys == ["policy", "critic", "reward.parts[0].path"]


def test_a_function_alone_needs_no_reward_model(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "taste.py"
    file.write_text("def shorter(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n")
    words = [
        *(f"runs={tmp_path / 'runs'}", *SMALL["ppo"], f"policy={tiny_run}/sft/model", "updates=2"),
        *("reward=function", f"reward.function={file}:shorter"),
    ]
    refused = run_stage("ppo", *words)
    assert "run stage=rm first" in refused.error and "critic=null" in refused.error
    result = run_stage("ppo", *words, "critic=null")
    assert result.status == 0, result.output


def test_the_reward_model_may_have_another_tokenizer(tiny_run: Path, tmp_path: Path) -> None:
    base = other_tokenizer_model(tmp_path / "base")
    run = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("evaluate", "ppo", "rm"))
    words = [f"runs={run.parent}", *SMALL["rm"], f"base={base}"]
    assert "calibration_policy=null" in run_stage("rm", *words).error
    trained = run_stage("rm", *words, "calibration_policy=null")
    assert trained.status == 0, trained.output
    result = run_stage("ppo", f"runs={run.parent}", *SMALL["ppo"], "force=true", "updates=2")
    assert result.status == 0, result.output
    first = read_lines(run / "ppo" / "metrics.jsonl")[0]
    assert abs(first["kl"]) < 1e-4 and first["value_loss"] > 0
    assert "critic: from the policy" in result.output
    parents = read_json(run / "ppo" / "stage.json")["parents"]
    assert [parent["key"] for parent in parents] == ["policy", "reward.path"], "the critic came from neither"
    card = (run / "rm" / "model" / "README.md").read_text(encoding="utf-8")
    assert "the end token `<eos>`" in card.replace("\n", " ")

    words = [f"runs={run.parent}", *SMALL["ppo"], "force=true", "overwrite=true", f"critic={base}"]
    assert "without a score head" in run_stage("ppo", *words).error


def test_a_llama_from_elsewhere_runs_the_whole_chain(shared: Path, tmp_path: Path) -> None:
    good, bad = ("happy", "kind", "big and red"), ("sad", "cold", "dull and old")
    names = ("Tim", "Lily", "Max", "Sam", "Anna", "Ben", "Tom", "Mia", "Sue", "Dan")
    prompts = [
        f"{name} {verb} a {noun}" for name in names for verb in ("saw", "had") for noun in ("cat", "box")
    ]
    files: dict[str, list[dict[str, Any]]] = {
        "demonstrations": [
            {"prompt": p, "response": f" that was {good[i % 3]}."} for i, p in enumerate(prompts)
        ],
        "prompts": [{"prompt": p} for p in prompts],
        "labelled": [
            {"text": f"{p} that was {(good if label else bad)[i % 3]}.", "label": label}
            for i, p in enumerate(prompts)
            for label in (0, 1)
        ],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    sources = [
        *(f"data.demonstrations.{part}={tmp_path}/demonstrations.jsonl" for part in ("train", "eval")),
        *(f"data.prompts.{part}={tmp_path}/prompts.jsonl" for part in ("collect", "ppo", "evaluate")),
        *(f"data.labelled.{part}={tmp_path}/labelled.jsonl" for part in ("labeller", "gold")),
    ]
    model = shared / "data" / "models" / "stories260K"
    words = [
        "data=local",
        *sources,
        "adapter=none",
        "data.max_prompt_tokens=24",
        "data.max_response_tokens=16",
    ]
    run = run_chain(tmp_path, f"model.path={model}", *words, name="stories")
    report = read_json(run / "evaluate" / "report.json")
    assert report["systems"]["ppo"]["gold"] is not None and report["systems"]["ppo"]["kl"] is not None
    test_plain_transformers_gives_the_reward_models_scores(run)


def other_tokenizer_model(folder: Path) -> Path:
    """A small GPT-2 whose tokens are words, so that no token id means what it means to the tiny policy."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    words = (
        "the",
        "my",
        "was",
        "is",
        "and",
        ",",
        ".",
        "good",
        "bad",
        "warm",
        "cold",
        "old",
        "red",
        "soup",
        "dog",
    )
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *words])}
    words_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
