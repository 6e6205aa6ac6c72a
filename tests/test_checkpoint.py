"""Stage folders: whole or not at all, resumed only with their own settings."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from rlhf.checkpoint import StageFolder
from rlhf.checks import Check
from rlhf.config import load_config
from rlhf.files import hash_path, new_folder, save_model_folder, write_text
from rlhf.metrics import cut_lines_after
from rlhf.parents import check_there, find_parent

# A safetensors file without tensors: the header's length, and the header.
EMPTY_WEIGHTS = (2).to_bytes(8, "little") + b"{}"
GOOD = Check("held-out loss", True, "1.0", "fine")


def folder_of(tmp_path: Path, stage: str = "ppo") -> StageFolder:
    return StageFolder(str(tmp_path), "run", stage)


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "model"

    def write(folder: Path) -> None:
        (folder / "weights").write_text("new")
        assert not final.exists()

    new_folder(final, write)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "model"
    new_folder(final, lambda folder: (folder / "weights").write_text("old"))

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        new_folder(final, fail)
    assert (final / "weights").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", [functools.partial(OSError, 28), SafetensorError])
def test_a_full_disk_is_one_clear_error_and_the_old_folder_stays(tmp_path: Path, kind: Any) -> None:
    final = tmp_path / "state"
    final.mkdir()

    def fail(folder: Path) -> None:
        raise kind("No space left on device")

    with pytest.raises(ValueError, match=r"cannot write .*state: .*No space left.*set runs="):
        new_folder(final, fail)
    assert final.exists() and len(list(tmp_path.iterdir())) == 1


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "två")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "två"
    assert len(list(tmp_path.iterdir())) == 1


def test_states_are_kept_to_the_number_asked_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for step in (2, 4, 10):
        folder.new_state(step, lambda state: (state / "weights").write_text(state.name), keep_last=2)
    assert {path.name for path in (folder.path / "state").iterdir()} == {"step_4", "step_10"}
    latest = folder.latest_state()
    assert latest is not None and (latest / "weights").read_text().startswith(".step_10.")


def test_the_latest_state_is_the_newest_whole_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "sft")
    assert folder.latest_state() is None
    parts = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    for step, text in ((90, "{}"), (100, "{}"), (110, '{"epoch": 1'), (120, None), (130, "{}")):
        checkpoint = folder.path / "state" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for part in parts if step < 130 else parts[:-1]:  # of the last one a file is lost
            (checkpoint / part).touch()
        if text is not None:  # a kill while it is written leaves half of it, or nothing
            (checkpoint / "trainer_state.json").write_text(text)
    (folder.path / "state" / ".step_140.1.tmp").mkdir()
    latest = folder.latest_state()
    assert latest is not None and latest.name == "checkpoint-100"
    for step in (90, 100):
        (folder.path / "state" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"has lost some of its files .*start again with overwrite=true"):
            folder.check_free(overwrite=False, resume=resume)


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    code = f"""if True:
        from rlhf.checkpoint import StageFolder
        folder = StageFolder({str(tmp_path)!r}, "run", "ppo")
        folder.prepare("seed: 1\\n", overwrite=False, resume=False)
        print("ready", flush=True)
        input()"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=r"another process is running stage ppo in .*set name="):
            folder_of(tmp_path).prepare("seed: 2\n", overwrite=True, resume=False)
        assert (folder_of(tmp_path).path / "config.yaml").read_text() == "seed: 1\n"
        other.communicate("\n")
    assert folder_of(tmp_path).prepare("seed: 2\n", overwrite=False, resume=False) is None


def test_a_line_that_a_kill_cut_inside_a_character_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1, "text": "é"}\n{"step": 2}\n{"step": 2, "text": "é'.encode()[:-1])
    cut_lines_after(path, 1)
    assert path.read_text(encoding="utf-8") == '{"step": 1, "text": "é"}\n'
    path.write_bytes(b'{"st')
    cut_lines_after(path, 1)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{", "[]", "{}"])
def test_a_line_that_someone_broke_is_named_and_left(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged .*: mend the line, or delete the file"):
        cut_lines_after(path, 2)
    assert path.read_text().count("\n") == 3


def test_a_missing_model_is_named_before_anything_is_imported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"policy=.*has not been run; run stage=sft first"):
        check_there(load_config("ppo", [f"runs={tmp_path}", "name=x"]), tmp_path / "x" / "ppo")
    with pytest.raises(FileNotFoundError, match=r"base=.*run stage=sft first"):
        check_there(load_config("rm", [f"runs={tmp_path}", "name=x"]), tmp_path / "x" / "rm")
    check_there(load_config("sft", [f"runs={tmp_path}", "model=gpt2"]), tmp_path / "gpt2" / "sft")
    policy = tmp_path / "elsewhere"
    for missing, other in (("critic", "reward.path"), ("reward.path", "critic")):
        words = [f"runs={tmp_path / 'runs'}", "name=x", f"policy={policy}", f"{other}={policy}"]
        with pytest.raises(FileNotFoundError, match=rf"{missing}=.*run stage=rm first"):
            check_there(load_config("ppo", words), tmp_path / "runs" / "x" / "ppo")


def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write to .*/runs; set runs="):
        StageFolder(str(tmp_path / "runs"), "n", "sft").check_free(overwrite=False, resume=False)


def test_a_stage_does_not_stand_on_the_folder_that_it_replaces(tmp_path: Path) -> None:
    model = tmp_path / "x" / "ppo" / "model"
    model.mkdir(parents=True)
    config = load_config("ppo", [f"runs={tmp_path}", "name=x", f"policy={model}"])
    with pytest.raises(ValueError, match=r"policy=.* lies in .*x/ppo, which this stage replaces: .* name="):
        check_there(config, tmp_path / "x" / "ppo")


def test_a_finished_folder_is_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert folder.prepare("seed: 1\n", overwrite=False, resume=False) is None
    folder.finish("policy", parents=[], checks=[GOOD])
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"stage ppo is finished, .*overwrite=true"):
            folder.prepare("seed: 1\n", overwrite=False, resume=resume)
    (folder.path / "metrics.jsonl").write_text("old")
    for _ in range(2):  # the second one finds the first unfinished
        assert folder.prepare("seed: 1\n", overwrite=True, resume=False) is None
        assert not (folder.path / "stage.json").exists()
        assert (folder.before / "metrics.jsonl").read_text() == "old"
    folder.finish("policy", parents=[], checks=[GOOD])
    assert [path.name for path in folder.path.parent.iterdir() if path.is_dir()] == ["ppo"]


def test_an_interrupted_folder_says_how_to_go_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.prepare("seed: 1\n", overwrite=False, resume=False)
    folder.new_state(3, lambda state: None, keep_last=1)
    with pytest.raises(ValueError, match=r"interrupted at state/step_3 .*resume=true .*overwrite=true"):
        folder.prepare("seed: 1\n", overwrite=False, resume=False)
    assert folder.prepare("seed: 1\n", overwrite=False, resume=True) == folder.path / "state" / "step_3"


@pytest.mark.parametrize("settings", [None, "seed: [", "- 1", "3"])
def test_settings_that_cannot_be_read_are_named_with_the_way_out(
    tmp_path: Path, settings: str | None
) -> None:
    folder = folder_of(tmp_path)
    folder.prepare("seed: 1\n", overwrite=False, resume=False)
    folder.new_state(3, lambda state: None, keep_last=1)
    (folder.path / "config.yaml").unlink()
    if settings is not None:
        (folder.path / "config.yaml").write_text(settings)
    with pytest.raises(
        ValueError, match=r"config.yaml does not hold the settings .*overwrite=true starts it"
    ):
        folder.prepare("seed: 1\n", overwrite=False, resume=True)
    assert folder.latest_state() is not None, "nothing is lost"


def test_a_resumed_folder_has_its_own_settings(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    before = "seed: 1\nkl: {coef: 0.1, target: 6}\nresume: false\nkeep_last: 1\n"
    folder.prepare(before, overwrite=False, resume=False)
    folder.new_state(3, lambda state: None, keep_last=1)
    same = "seed: 1\nkl: {coef: 0.1, target: 6}\nresume: true\nkeep_last: 5\n"
    assert folder.prepare(same, overwrite=False, resume=True) is not None
    other = "seed: 2\nkl: {coef: 0.2, target: 6}\nresume: true\nkeep_last: 5\n"
    with pytest.raises(ValueError, match=r"settings: kl.coef \(0.1 -> 0.2\), seed \(1 -> 2\); give the old"):
        folder.prepare(other, overwrite=False, resume=True)
    assert (folder.path / "config.yaml").read_text() == same  # the refused one left no trace


def test_stage_json_states_kind_parents_and_hashes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "sft")
    folder.prepare("seed: 1\n", overwrite=False, resume=False)

    def save(path: Path) -> None:
        (path / "model.safetensors").write_bytes(EMPTY_WEIGHTS)
        (path / "config.json").write_text("{}")

    save_model_folder(folder.model, save, "a card")
    folder.finish("policy", parents=[], checks=[GOOD], results={"loss": 1.0})
    parent = find_parent("policy", str(folder.model), kind="policy", force=False)
    # by the sha256sum of coreutils
    assert parent.sha256 == "411a485216e432ece6b9af94fa32154cf79a2a56d4f81266baa50063f45092bd"
    assert parent.sha256 == hash_path(folder.model) == hash_path(folder.model / "model.safetensors")
    child = folder_of(tmp_path)
    child.prepare("seed: 1\n", overwrite=False, resume=False)
    child.finish("policy", parents=[parent], checks=[GOOD])
    record = json.loads((child.path / "stage.json").read_text())
    assert record["parents"] == [{"key": "policy", "path": str(folder.model), "sha256": parent.sha256}]
    assert (folder.model / "README.md").read_text() == "a card"


def finished_policy(tmp_path: Path) -> StageFolder:
    folder = folder_of(tmp_path, "sft")
    folder.prepare("seed: 1\n", overwrite=False, resume=False)
    folder.model.mkdir()
    (folder.model / "model.safetensors").write_bytes(EMPTY_WEIGHTS)
    (folder.model / "config.json").write_text("{}")
    folder.finish("policy", parents=[], checks=[GOOD])
    return folder


def test_weights_that_the_stage_did_not_write_are_refused(tmp_path: Path) -> None:
    folder = finished_policy(tmp_path)
    (folder.model / "model.safetensors").write_bytes((3).to_bytes(8, "little") + b"{ }")
    with pytest.raises(ValueError, match=r"not those that stage sft wrote .* force=true"):
        find_parent("policy", str(folder.model), kind="policy", force=False)
    parent = find_parent("policy", str(folder.model), kind="policy", force=True)
    assert parent.sha256 == hash_path(folder.model)


def test_weights_that_were_cut_short_are_refused(tmp_path: Path) -> None:
    folder = finished_policy(tmp_path)
    (folder.model / "model.safetensors").write_bytes(EMPTY_WEIGHTS[:9])
    with pytest.raises(ValueError, match=r"policy=.*: model\.safetensors is cut short or damaged"):
        find_parent("policy", str(folder.model), kind="policy", force=True)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = finished_policy(tmp_path)
    (folder.path / "stage.json").write_text('{"stage"')
    with pytest.raises(ValueError, match=r"policy: .*stage\.json is damaged .* run its stage again"):
        find_parent("policy", str(folder.model), kind="policy", force=False)


def test_a_parent_that_stands_on_what_was_replaced_is_refused(tmp_path: Path) -> None:
    base = finished_policy(tmp_path)
    folder = folder_of(tmp_path, "rm")
    folder.prepare("seed: 1\n", overwrite=False, resume=False)
    (folder.path / "ranked.jsonl").write_text("{}\n")
    parents = [find_parent("base", str(base.model), kind="policy", force=False)]
    folder.finish("records", parents=parents, checks=[GOOD])
    records = str(folder.path / "ranked.jsonl")
    assert find_parent("ranked.train", records, kind="records", force=False).sha256
    (base.model / "model.safetensors").write_bytes((3).to_bytes(8, "little") + b"{ }")
    with pytest.raises(ValueError, match=r"from .*sft/model, which has been replaced since; run stage"):
        find_parent("ranked.train", records, kind="records", force=False)
    assert find_parent("ranked.train", records, kind="records", force=True).sha256


def test_a_missing_result_that_is_being_replaced_names_the_one_before(tmp_path: Path) -> None:
    folder = finished_policy(tmp_path)
    folder.prepare("seed: 1\n", overwrite=True, resume=False)
    with pytest.raises(FileNotFoundError, match=r"stage=sft resume=true first, .*=.*/sft\.before/model"):
        find_parent("policy", str(folder.model), kind="policy", force=False)


def test_other_weights_have_another_hash(tmp_path: Path) -> None:
    hashes = set()
    for text in (b"a", b"b"):
        (tmp_path / "model.safetensors").write_bytes(text)
        hashes.add(hash_path(tmp_path))
    assert len(hashes) == 2


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "sft" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"holds an adapter alone; name the merged model: .*sft/model"
    ):
        find_parent("policy", str(folder), kind="policy", force=False)
