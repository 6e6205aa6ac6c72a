"""The one entry point, `python -m stages stage=<stage> key=value ...`: help, errors, show=true or the stage.

Nothing heavy is imported before a stage starts.
"""

import functools
import importlib
import logging
import os
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS_TO_SPEAK = 3.0
HELP_WORDS = {"help", "--help", "-h"}
HELP_FILE = Path(__file__).with_name("help.txt")


def main(words: list[str]) -> int:
    """Run the stage that `words` ask for; return 0, 2 for a user's error, 130 when interrupted."""
    if not words or HELP_WORDS & set(words):
        print(HELP_FILE.read_text(encoding="utf-8"), end="")
        return 0
    from rlhf.processes import RANK, OthersEndedError

    try:
        from stages.foreign import taken_over

        words = taken_over(words)
        stage, overrides = read_words(words)
        return run(stage, overrides)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
        return 0
    except (OthersEndedError, RuntimeError) as error:
        # within DeepSpeed's own exchanges a lost connection is a plain RuntimeError
        lost = RANK in os.environ and "by peer" in str(error)
        if not (lost or isinstance(error, OthersEndedError)):
            raise
        time.sleep(SECONDS_TO_SPEAK)  # whoever knows why says so meanwhile, and this process is ended
        say(f"error: the other processes of this run were lost ({error})")
        return 2
    except (ValueError, OSError) as error:  # OSError: missing files, a full disk, a hub name not found
        if os.environ.get("RLHF_TRACEBACK") == "1":
            raise
        close_bars()
        if os.environ.get(RANK, "0") != "0":
            time.sleep(SECONDS_TO_SPEAK)  # the first process says it, unless it is well
        say(f"error: {in_words_of_the_command(str(error))}")
        return 2
    except KeyboardInterrupt:
        if os.environ.get(RANK, "0") != "0":
            time.sleep(
                SECONDS_TO_SPEAK
            )  # the first process says it, before the launcher ends it for this one's end
        print(f"\ninterrupted; to go on: {resume_command(words)}", file=sys.stderr)
        return 130


def in_words_of_the_command(text: str) -> str:
    """An error with the keys that were typed: stage=compare calls its two systems a= and b=."""
    from stages import COMMAND_VARIABLE

    if "stage=compare" not in os.environ.get(COMMAND_VARIABLE, ""):
        return text
    return re.sub(r"\bsystems\.([ab])(\.generations)?(?=[=:])", r"\1", text)


def say(text: str) -> None:
    """Print to the terminal, naming the process unless it is the first."""
    from rlhf.processes import RANK

    rank = os.environ.get(RANK, "0")
    if rank == "0":
        print(text, file=sys.stderr, flush=True)
    else:
        print(f"{text} (process {rank})", file=sys.__stderr__, flush=True)


def read_words(words: list[str]) -> tuple[str, list[str]]:
    """Part the words into the stage and its settings. Raises ValueError naming the nearest stage."""
    from rlhf.config import PROGRAMS
    from rlhf.hints import hint, nearest

    known = ("all", *PROGRAMS, "compare", "test")
    named = [word.partition("=")[2] for word in words if word.startswith("stage=")]
    overrides = [word for word in words if not word.startswith("stage=")]
    if len(named) != 1:
        problem = f"{len(named)} stages given" if named else "no stage given"
        meant = [word.partition("=")[2] for word in words if nearest(word.partition("=")[0], ["stage"])]
        guess = next((f"did you mean stage={word}? " for word in [*words, *meant] if word in known), "")
        raise ValueError(f"{problem}: {guess}stage= is one of {', '.join(known)}")
    stage = named[0]
    if stage not in known:
        raise ValueError(f"stage={stage}: {hint(stage, known)}stage= is one of {', '.join(known)}")
    if stage == "test":
        raise ValueError("stage=test is run by launch.sh: ./launch.sh stage=test")
    return stage, overrides


def run(stage: str, overrides: list[str]) -> int:
    """Resolve every setting, then show it or run the stage."""
    from rlhf.checkpoint import StageFolder
    from rlhf.config import load_config
    from rlhf.parents import check_there
    from rlhf.processes import RANK, leave
    from stages.common import make_inputs
    from stages.foreign import check_stage, is_foreign, make_inputs_once
    from stages.launch import launch, place_of
    from stages.show import show

    if os.environ.get(RANK, "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    quiet_libraries()
    if is_foreign():
        check_stage(stage)
    if stage in SEVERAL:
        return SEVERAL[stage](overrides)
    config = load_config(stage, overrides)
    if stage == "evaluate" and not config.show:
        # MKL's products are then the same for any number of threads: several processes have fewer each
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    if stage != "bench":
        check_here(config)
    if config.show:
        show(stage, config)
        return 0
    if stage not in ("bench", "chat") and (RANK not in os.environ or is_foreign()):
        # where several processes check, none writes before all have met
        folder = StageFolder(config.runs, config.name, stage)
        again = stage == "evaluate" and config.resume  # what it made is in its store
        folder.check_free(overwrite=config.overwrite or again, resume=config.resume)
        check_there(config, folder.path)
        if is_foreign():
            make_inputs_once(config)
        elif place_of(config).count > 1:
            make_inputs(config)
            return launch(stage, overrides, config)
    status = importlib.import_module(f"stages.{stage}").main(overrides)
    leave()
    return status or 0


def check_here(config: Any) -> None:
    """Raise ValueError for settings that do not fit the processes there are or, unless all is only shown, the
    devices.
    """
    from rlhf.processes import RANK
    from stages.foreign import check_fits, is_foreign
    from stages.launch import place_of

    if is_foreign():
        check_fits(config)
    elif RANK not in os.environ:
        place_of(config)
    if not config.show and config.engine.device not in ("auto", "cpu"):
        from rlhf.engine import find_device  # with torch

        find_device(config.engine.device)


def run_all(overrides: list[str]) -> int:
    """Resolve the settings of all stages, then show them or run the stages one after the other, once for each
    seed where there are several.
    """
    from stages import all as all_stages
    from stages import seeds
    from stages.show import show

    several = any(word.startswith(seeds.KEY) for word in overrides)
    words = list(seeds.plan(overrides)[1].values()) if several else [overrides]
    configs = all_stages.load_configs(words[0])
    if any(config.show for config in configs.values()):
        for name, config in configs.items():
            show(name, config)
        return 0
    return seeds.run(overrides) if several else all_stages.run(configs, overrides)[0]


def run_experiments(program: str, overrides: list[str]) -> int:
    """Resolve the settings of all that is compared, then show its commands or run them in turn."""
    from stages import experiments

    if "show=true" in overrides:
        experiments.show(program, [word for word in overrides if word != "show=true"])
        return 0
    return experiments.run(program, overrides)


def run_compare(overrides: list[str]) -> int:
    """Resolve the settings of a comparison of two systems, then show them or run it."""
    from stages import compare
    from stages.show import show

    config, _ = compare.plan(overrides)
    if config.show:
        show("evaluate", config)
        return 0
    return compare.run(overrides)


# the programs that run stages, each a process of its own
SEVERAL: dict[str, Callable[[list[str]], int]] = {
    "all": run_all,
    "compare": run_compare,
    "exposure": functools.partial(run_experiments, "exposure"),
    "overoptimization": functools.partial(run_experiments, "overoptimization"),
}


def close_bars() -> None:
    """End the line of every open progress bar."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def end_with_parent() -> None:
    """End this process once the one that started it is gone: nobody would be told of its end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def quiet_libraries() -> None:
    """Keep libraries' notes on their own optional parts out of a stage's output."""
    for name in ("bitsandbytes", "torch.distributed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def resume_command(words: list[str]) -> str:
    """Return the command that goes on with what `words` started: the same one, where a finished stage has not
    been taken out of its way yet.
    """
    from rlhf.checkpoint import StageFolder
    from rlhf.config import load_config
    from stages.common import without_run_mode

    stage, overrides = read_words(words)
    if stage not in SEVERAL:
        config = load_config(stage, overrides)
        if (StageFolder(config.runs, config.name, stage).path / "stage.json").exists():
            return shlex.join(["./launch.sh", *words])
    return shlex.join(["./launch.sh", *without_run_mode(words), "resume=true"])


if __name__ == "__main__":
    # nothing in the user's folder or in stages/ may pass for a library; the user's functions stay importable
    sys.path[0] = str(HELP_FILE.resolve().parents[1])
    sys.path.append(os.getcwd())
    from rlhf.processes import RANK
    from stages import COMMAND_VARIABLE

    # started by another process of ours, or by another launcher
    if {COMMAND_VARIABLE, RANK} & set(os.environ) or os.environ.get("WORLD_SIZE", "1") != "1":
        end_with_parent()
    status = main(sys.argv[1:])
    # still joined to the others; and DeepSpeed's threads may abort a process that ends as usual
    if (status and RANK in os.environ) or "deepspeed" in sys.modules:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
