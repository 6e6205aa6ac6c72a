"""Wrong inputs of a stage: each is refused with one line that says what is wrong and what to do."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from tests.stage_runs import SMALL, read_json, run_stage

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run without ppo and evaluate."""
    copy = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("ppo", "evaluate"))
    return copy


def refusal(stage: str, run: Path, *words: str) -> str:
    return run_stage(stage, f"runs={run.parent}", *SMALL[stage], *words).error


def test_a_reward_model_is_no_policy(run: Path) -> None:
    found = refusal("ppo", run, f"policy={run}/rm/model", "force=true")
    assert "policy=" in found and "written by stage rm: a reward model; a policy is due here" in found
    found = refusal("evaluate", run, f"systems={{mine: '{run}/rm/model'}}", "force=true")
    assert "systems.mine=" in found and "a policy is due here" in found
    oracle = (f"systems={{mine: '{run}/sft/model'}}", f"oracle={run}/rm/model", "force=true")
    found = refusal("evaluate", run, *oracle)
    assert f"oracle={run}/rm/model was written by stage rm: a reward model; a policy is due here" in found


def test_a_reward_model_from_elsewhere_is_no_policy(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "rm" / "model", tmp_path / "elsewhere")
    found = refusal("ppo", run, f"policy={tmp_path}/elsewhere", "force=true")
    assert "is a reward model (GPT2ForSequenceClassification); a language model is due here" in found


def test_a_policy_is_no_reward_model(run: Path, tmp_path: Path) -> None:
    found = refusal("ppo", run, f"reward.path={run}/sft/model", "force=true")
    assert "reward.path=" in found and "written by stage sft: a policy; a reward model is due here" in found
    shutil.copytree(run / "sft" / "model", tmp_path / "elsewhere")
    found = refusal("ppo", run, f"critic={tmp_path}/elsewhere", "force=true")
    assert "critic=" in found and "without a score head" in found and "stage=rm" in found


def test_a_labeller_must_be_a_reward_model(run: Path) -> None:
    words = ["overwrite=true", "labeller.kind=model", f"labeller.path={run}/sft/model"]
    found = refusal("collect", run, *words)
    assert "labeller.path=" in found and "a reward model is due here" in found


def test_a_missing_head_is_named(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(run / "rm" / "model", folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if name != "score.weight"},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = refusal("ppo", run, f"critic={folder}", "force=true")
    assert "no weights for ['score.weight']" in found and "stage=rm" in found


def test_a_half_written_folder_is_named(run: Path) -> None:
    (run / "sft" / "stage.json").unlink()
    found = refusal("collect", run, "overwrite=true")
    assert "policy=" in found and "half written" in found and "stage=sft resume=true" in found
    shutil.copytree(run / "sft", run / "a copy")
    found = refusal("collect", run, "overwrite=true", f"policy={run / 'a copy' / 'model'}")
    assert "half written" in found and "stage=a copy" not in found


def test_weights_in_pickles_are_refused_as_such(run: Path, tmp_path: Path) -> None:
    shutil.copytree(
        run / "sft" / "model", tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"never read")
    found = refusal("collect", run, "overwrite=true", f"policy={tmp_path / 'pickled'}")
    assert "pickles" in found and "safe_serialization=True" in found


@pytest.mark.parametrize(
    ("lost", "named"), [("model.safetensors", "weights"), ("config.json", "config.json")]
)
def test_lost_files_are_named(run: Path, lost: str, named: str) -> None:
    (run / "rm" / "model" / lost).unlink()
    found = refusal("ppo", run, "force=true")
    assert "critic=" in found and f"has no {named}" in found


def test_a_missing_parent_names_the_stage_to_run(run: Path) -> None:
    shutil.rmtree(run / "rm")
    assert "rm/model does not exist" in (found := refusal("ppo", run, "force=true"))
    assert "has not been run; run stage=rm first" in found
    shutil.rmtree(run / "collect")
    found = refusal("rm", run)
    assert "ranked.train=" in found and "run stage=collect first" in found
    shutil.rmtree(run / "sft")
    for stage in ("collect", "evaluate"):
        assert "run stage=sft first" in refusal(stage, run)


def test_relative_folders_are_paths_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.parents import find_parent

    monkeypatch.chdir(run.parents[1])
    with pytest.raises(FileNotFoundError, match="run stage=ppo first"):
        find_parent("policy", f"runs/{run.name}/ppo/model", kind="policy", force=False)
    assert find_parent("policy", "owner/name", kind="policy", force=False).sha256 == ""


def test_a_stages_own_folder_is_not_its_model(run: Path) -> None:
    from rlhf.parents import find_parent

    with pytest.raises(FileNotFoundError, match=r"is a stage's folder; name .*sft/model"):
        find_parent("policy", str(run / "sft"), kind="policy", force=False)


def test_a_parent_that_failed_its_checks_stops_unless_forced(run: Path) -> None:
    import json

    from rlhf.parents import find_parent

    record = read_json(run / "sft" / "stage.json")
    record["checks"][0] |= {"passed": False, "value": "6.1 against 5.5"}
    (run / "sft" / "stage.json").write_text(json.dumps(record))
    found = refusal("collect", run, "overwrite=true")
    assert "failed its own checks: held-out loss below the base's: 6.1 against 5.5" in found
    assert "force=true" in found
    find_parent("systems.sft", str(run / "sft" / "model"), kind="policy", force=False)  # to be compared
    words = [f"runs={run.parent}", *SMALL["collect"], "overwrite=true", "force=true"]
    assert run_stage("collect", *words).status == 0


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    found = run_stage("sft", f"runs={tmp_path}/runs", *SMALL["sft"]).error
    assert "cannot write to" in found and "set runs=" in found


def test_best_of_n_needs_a_proxy(run: Path) -> None:
    words = [f"systems={{mine: {{path: '{run}/sft/model', best_of: 4}}}}", "proxy=null", "force=true"]
    assert "systems.mine: best_of=4 needs a proxy" in refusal("evaluate", run, *words)


def test_no_scorer_at_all_is_refused(run: Path) -> None:
    assert "neither proxy nor gold can score" in refusal(
        "evaluate", run, "proxy=null", "gold=null", "force=true", f"systems={{mine: '{run}/sft/model'}}"
    )


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("sft", ("data.demonstrations.train=nowhere.jsonl",)),
        ("collect", ("data.prompts.collect=nowhere.jsonl",)),
        ("collect", ("labeller.kind=function", "labeller.function=nowhere.py:f")),
        ("rm", ("ranked.train=nowhere.jsonl",)),
        ("rm", ("max_length=4000",)),
    ],
)
def test_overwriting_with_a_wrong_input_loses_nothing(run: Path, stage: str, words: tuple[str, ...]) -> None:
    before = {path: path.read_bytes() for path in (run / stage).rglob("*") if path.is_file()}
    found = refusal(stage, run, "overwrite=true", *words)
    key, _, value = words[-1].partition("=")
    assert key.split(".")[-1] in found and value.partition(":")[0] in found
    assert {path: path.read_bytes() for path in (run / stage).rglob("*") if path.is_file()} == before


def test_a_model_without_its_tokenizer_is_named(run: Path, shared: Path, tmp_path: Path) -> None:
    without, foreign = tmp_path / "without", tmp_path / "foreign"
    for folder in (without, foreign):
        shutil.copytree(run / "sft" / "model", folder)
        for file in folder.glob("token*"):
            file.unlink()
    for file in (shared / "data" / "models" / "stories260K").glob("token*"):
        shutil.copy(file, foreign)
    assert f"{without} has no tokenizer" in refusal(
        "ppo", run, f"policy={without}", "critic=null", "force=true"
    )
    found = refusal("ppo", run, f"policy={foreign}", "critic=null", "force=true")
    assert f"{foreign}: its tokenizer has token ids up to 511" in found and "do not belong together" in found


def _go_offline() -> None:
    """As HF_HUB_OFFLINE=1 does, which is read when the library is imported."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def test_a_name_that_leads_nowhere_is_found_before_the_first_sample(run: Path) -> None:
    result = run_stage(
        "evaluate",
        f"runs={run.parent}",
        *SMALL["evaluate"],
        f"systems={{mine: '{run}/sft/model', theirs: nobody/nothing}}",
        first=_go_offline,
    )
    assert "nobody/nothing: no model folder of that name is here" in result.error
    assert "response" not in result.output and not (run / "evaluate").exists()


def test_lengths_beyond_the_models_context_are_refused(run: Path) -> None:
    found = refusal("collect", run, "overwrite=true", "data.max_response_tokens=4000")
    assert "data.max_prompt_tokens + data.max_response_tokens=" in found and "has a context of" in found
