"""stage=bench: what this machine does in a second, and what one PPO update costs with each adapter."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.checkpoint import library_versions
from rlhf.config import PROJECT_DIR, group_choices, load_config
from rlhf.files import write_text
from rlhf.hints import hint
from rlhf.metrics import progress
from rlhf.sources import fetch_wheel, nearest_existing, resolve_model
from stages.launch import Place, end, start

TRL_PPO_WHEEL = ("trl", "1.12.0", "9c8f117b21a941edbc85744f5a341c9453d38e81f24ae81d3c6e9b9ca3b96409")
ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
SMALLEST_PASS = 256
PHASES = ("sample", "score", "experience", "learn", "other")


def main(overrides: list[str]) -> None:
    """Run every part in a process of its own, one after the other, and print and write the tables."""
    config = load_config("bench", overrides)
    _check(config)
    folder = Path(config.runs) / config.name / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    config.model.path = resolve_model(config.model.path, config.model.revision)
    spec = asdict(config)
    spec["lora"] = spec.pop("adapter")
    if config.find_tokens_per_pass:
        find_tokens_per_pass(config, spec)
        return
    peers = [adapter for adapter in config.adapters if config.peer and adapter in ("none", "lora")]
    found: dict[str, Any] = {"ppo": {}, "peer": {}}
    engines = ("zero2", "zero3") if config.zero_processes else ()
    alone = {**spec["engine"], "deepspeed": None}
    total = 3 + config.rounds * (len(config.adapters) + len(peers)) + len(engines)
    bar = progress(total, initial=0, unit="part", description="bench")
    with tempfile.TemporaryDirectory() as temporary:
        spec["folder"] = temporary

        def run(part: str, **more: Any) -> Any:
            result = run_own(part, {**spec, "engine": alone, **more})
            bar.update(1)
            return result

        def run_ppo(adapter: str) -> Any:
            if config.num_processes is None:
                return run("ppo", adapter=adapter)
            result = run_several("ppo", config.num_processes, {**spec, "adapter": adapter})
            bar.update(1)
            return result

        found["products"] = run("products")
        found["sampler"] = run("sampler")
        for name in engines:
            engine = {**alone, "deepspeed": load_config("ppo", [f"engine={name}"]).engine.deepspeed}
            found.setdefault("rollout", {})[name] = run_several(
                "rollout", config.zero_processes, {**spec, "engine": engine}
            )
            bar.update(1)
        run("prepare")
        for adapter in config.adapters:
            ours, theirs = [], []
            for _ in range(config.rounds):
                ours.append(run_ppo(adapter))
                if adapter in peers:
                    theirs.append(run_peer(config, spec, ours[0]["dtype"], adapter))
                    bar.update(1)
            found["ppo"][adapter] = _median(ours)
            if theirs:
                pairs = zip(ours, theirs, strict=True)
                ratios = [one["episodes_per_s"] / two["episodes_per_s"] for one, two in pairs]
                found["peer"][adapter] = {**_median(theirs), "ratios": ratios}
    bar.close()
    found |= {"settings": spec, "versions": library_versions(), "processors": os.cpu_count()}
    write_text(folder / "bench.json", json.dumps(found, indent=2) + "\n")
    report = table(found, command=shlex.join(["./launch.sh", "stage=bench", *overrides]))
    write_text(folder / "bench.md", report)
    print(report + f"\nwritten to {folder}/bench.md and bench.json")


def _check(config: Any) -> None:
    for adapter in config.adapters:
        if adapter not in group_choices("adapter"):
            known = group_choices("adapter")
            raise ValueError(f"adapters: {hint(adapter, known)}{adapter} is none of {', '.join(known)}")
    if config.peer and not Path(config.peer).expanduser().is_file():
        raise ValueError(
            f"peer={config.peer}: no such file{nearest_existing(Path(config.peer).expanduser())}"
        )


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(rows, key=lambda row: row["episodes_per_s"])[len(rows) // 2]


def run_own(part: str, spec: dict[str, Any]) -> Any:
    """Run a part of `rlhf.bench` in a process of its own."""
    return run_part([sys.executable, "-m", "rlhf.bench", json.dumps({**spec, "part": part})])


def find_tokens_per_pass(config: Any, spec: dict[str, Any]) -> None:
    """Learn with passes of twice as many tokens each time, until one pass holds the batch or the next would
    not fit into memory.
    """
    row = config.prompt_tokens + config.response_tokens
    with tempfile.TemporaryDirectory() as temporary:
        spec["folder"] = temporary
        run_own("prepare", spec)
        for adapter in config.adapters:
            print(f"{adapter}:\n  tokens_per_pass  learning tokens/s  peak GiB", flush=True)
            found: dict[int, Any] = {}
            size = SMALLEST_PASS
            while True:
                engine = {**spec["engine"], "tokens_per_pass": size}
                result = run_own("passes", {**spec, "engine": engine, "adapter": adapter})
                if not result["fits"]:
                    break
                found[size] = result
                print(
                    f"  {size:<16} {result['tokens_per_s']:<18.0f} {result['peak_memory_gib']:.2f}",
                    flush=True,
                )
                if size >= config.batch_size * row or _next_peak(found) > result["memory_gib"]:
                    break
                size *= 2
            if not found:
                print(f"  not even {SMALLEST_PASS} fit; try another adapter or a smaller model")
                continue
            fastest = max(found, key=lambda size: found[size]["tokens_per_s"])
            print(f"  longest that fit: engine.tokens_per_pass={max(found)}; fastest: {fastest}", flush=True)


def _next_peak(found: dict[int, Any]) -> float:
    """What twice the longest pass would take: activations grow with its tokens. GiB."""
    peaks = [result["peak_memory_gib"] for result in found.values()]
    return peaks[-1] + 2 * max(peaks[-1] - peaks[-2], 0.0) if len(peaks) > 1 else peaks[-1]


def run_part(command: list[str], **environment: str) -> Any:
    """Run a command and read the JSON of its last line; a failure ends with what it said.

    `environment` is added to this process's; an empty value takes a variable out of it.
    """
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    done = subprocess.run(
        command, cwd=PROJECT_DIR, env=variables, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise ValueError(f"a part of the bench failed (exit {done.returncode}):\n{said}")
    return json.loads(lines[-1])


def run_several(part: str, count: int, spec: dict[str, Any]) -> Any:
    """Run a part of `rlhf.bench` in several processes that do it together."""
    command = [sys.executable, "-m", "rlhf.bench", json.dumps({**spec, "part": part})]
    with tempfile.TemporaryFile("w+") as said:
        children = start(
            command, Place(count, count, 0, None), None, stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            while not any(child.poll() for child in children) and children[0].poll() is None:
                time.sleep(0.05)
            lines = children[0].stdout.read().strip().splitlines() if children[0].poll() == 0 else []
            if not lines:
                said.seek(0)
                raise ValueError(f"{part} by {count} processes failed:\n" + said.read()[-3000:])
        finally:
            end(children)
    return json.loads(lines[-1])


def run_peer(config: Any, spec: dict[str, Any], dtype: str, adapter: str) -> Any:
    """Time TRL's last PPO on the same workload; its own script prints episodes a second and peak memory."""
    with tempfile.TemporaryDirectory() as library:
        with zipfile.ZipFile(fetch_wheel(*TRL_PPO_WHEEL)) as wheel:
            wheel.extractall(library)
        options = {
            "episodes": config.updates * config.batch_size, "batch": config.batch_size,
            "prompt": config.prompt_tokens, "response": config.response_tokens, "epochs": config.epochs,
            "dtype": dtype, "lora": 0 if adapter == "none" else spec["lora"]["r"],
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        script = str(Path(config.peer).expanduser().absolute())
        # launch.sh sets the allocator for our own processes; the peer runs as its user would run it
        variables = {"PYTHONPATH": library, **dict.fromkeys(ALLOCATOR, "")}
        return run_part([sys.executable, script, spec["model"]["path"], *words], **variables)


def table(found: dict[str, Any], *, command: str) -> str:
    """The results as Markdown."""
    limit, sampler = found["products"]["limit"], found["sampler"]
    rates = ", ".join(
        f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in found["products"].items() if name != "limit"
    )
    lines = [
        f"`{command}`",
        "",
        f"Matrix products: {rates}.",
        f"Sampling: {sampler['ours']:.0f} tokens/s; Hugging Face generate {sampler['generate']:.0f}: "
        f"{sampler['ours'] / sampler['generate']:.2f} times as many.",
        "",
        "| PPO update | episodes/s | peak GiB | scoring tokens/s | learning tokens/s | "
        + " | ".join(f"{phase} s" for phase in PHASES)
        + " | of the product limit |",
        "|---|" + "---|" * (5 + len(PHASES)),
    ]
    for adapter, row in found["ppo"].items():
        name = f"{adapter}, {row['dtype']}" + (", one base for four roles" if row["one_trunk"] else "")
        updates = found["settings"]["updates"]
        seconds = " | ".join(f"{row['seconds'][phase] / updates:.1f}" for phase in PHASES)
        lines.append(
            f"| {name} | {row['episodes_per_s']:.2f} | {row['peak_memory_gib']:.2f} "
            f"| {row['tokens_per_s']['score']:.0f} | {row['tokens_per_s']['learn']:.0f} | {seconds} "
            f"| {row['flops']['whole'] / limit / row['devices']:.0%} |"
        )
    for adapter, row in found["ppo"].items():
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["operations"].items())
        lines += ["", f"Learning, {adapter}, by operation: {shares}."]
    for adapter, row in found["ppo"].items():
        if len(row["memory_gib"]) >= 10:
            lines += ["", f"Memory held, {adapter}: {row['memory_gib'][1]:.3f} GiB after update 2, "]
            lines[-1] += f"{row['memory_gib'][-1]:.3f} after update {len(row['memory_gib'])}."
    for name, row in found.get("rollout", {}).items():
        lines += ["", f"A rollout by {found['settings']['zero_processes']} processes under {name}: "]
        lines[-1] += f"{row['seconds']:.2f} s, of which weights are made ready in {row['ready_in']:.2f}."
    if found["peer"]:
        lines += [
            "",
            "| TRL 1.12.0 PPO | episodes/s | peak GiB | ours: times as fast | ours: share of its memory |",
        ]
        lines.append("|---|---|---|---|---|")
    for adapter, peer in found["peer"].items():
        ours, ratios = found["ppo"][adapter], sorted(peer["ratios"])
        spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
        lines.append(
            f"| {adapter} | {peer['episodes_per_s']:.2f} | {peer['peak_rss_gib']:.2f} "
            f"| {ratios[len(ratios) // 2]:.2f}{spread} "
            f"| {ours['peak_memory_gib'] / peer['peak_rss_gib']:.0%} |"
        )
    return "\n".join(lines) + "\n"
