"""The systems that are compared: a checkpoint with a way of decoding, and its samples on the evaluation
prompts.

P prompts, R response positions. All systems see the same prompts, the same length limit and the same random
numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlhf.batches import Rollout, join, left_pad
from rlhf.decoding import Decoding, system_decoding
from rlhf.files import write_text
from rlhf.models.forward import response_logprobs
from rlhf.processes import ALONE
from rlhf.records import PromptRecord
from rlhf.rewards import checked_scores
from rlhf.sampling.policy import Policy


@dataclass(frozen=True)
class System:
    """A checkpoint (folder or hub name), how it decodes, and whether the best of n samples is taken."""

    name: str
    path: str
    decoding: Decoding
    best_of: int = 1


@dataclass(frozen=True)
class Generation:
    """One response of a system: its text and tokens, and its log-prob under the way it was decoded."""

    prompt: Any
    response: str
    tokens: list[int]
    ended: bool
    logprob: float


def build_systems(specs: dict[str, Any], decoding: Decoding) -> list[System]:
    """Systems from the `systems` key: a path, or {path, decoding: {...}, best_of: n}."""
    systems = []
    for name, spec in specs.items():
        spec = {"path": spec} if isinstance(spec, str) else spec
        own = system_decoding(name, spec.get("decoding"), decoding)
        systems.append(System(name, spec["path"], own, int(spec.get("best_of") or 1)))
    return systems


def check_choosers(systems: Sequence[System], proxy: Any | None) -> None:
    """Refuse best-of-n where there is no proxy to choose by."""
    for system in systems:
        if system.best_of > 1 and proxy is None:
            raise ValueError(
                f"systems.{system.name}: best_of={system.best_of} needs a proxy to choose by; set proxy="
            )


def generate(  # noqa: PLR0913 (a system with its policy, what it answers, and how)
    system: System,
    policy: Policy,
    records: Sequence[PromptRecord],
    *,
    proxy: Any,
    batch_size: int,
    seed: int,
    bar: Any,
) -> list[Generation]:
    """One response of a system to each prompt; with `best_of` the one that the proxy scores highest.

    A process samples whole batches, so that the numbers are the same, to the last digit, for any number of
    processes.
    """
    assert system.best_of == 1 or proxy is not None, system
    processes, by_itself = policy.engine.processes, replace(policy.engine, processes=ALONE)
    own = replace(policy, engine=by_itself)
    per_batch = max(1, batch_size // (system.best_of * system.decoding.num_beams))
    starts = range(0, len(records), per_batch)

    def sampled(start: int) -> list[Generation]:
        batch = records[start : start + per_batch]
        prompts = [record.prompt for record in batch for _ in range(system.best_of)]
        found = _generations(
            prompts, own.respond(prompts, system.decoding, seed=seed * 1_000_003 + start), own
        )
        bar.update(len(batch))
        return found

    mine = [sampled(start) for start in processes.share(starts)]
    bar.update(len(records) - sum(len(found) for found in mine) // system.best_of)
    chosen: list[Generation] = []
    for found in processes.gathered(mine, len(starts)):
        if system.best_of > 1:
            scores = checked_scores(proxy, [g.prompt for g in found], [g.response for g in found])
            best = scores.view(-1, system.best_of).argmax(1)
            found = [found[i * system.best_of + int(b)] for i, b in enumerate(best)]
        chosen += found
    return chosen


def _generations(prompts: Sequence[Any], rollout: Rollout, policy: Policy) -> list[Generation]:
    assert rollout.behaviour_logprobs is not None
    logprobs = rollout.behaviour_logprobs.sum(1).tolist()
    columns = (prompts, policy.texts(rollout), rollout.responses(), policy.ended(rollout), logprobs)
    return [Generation(*row) for row in zip(*columns, strict=True)]


@torch.no_grad()
def reference_logprobs(
    reference: Policy, generations: Sequence[Generation], *, temperature: float
) -> list[float]:
    """Log-probs (P,) of whole responses under a reference policy with the same tokenizer."""
    codec, engine = reference.codec, reference.engine
    prompts = left_pad(
        [codec.encode_prompt(g.prompt) for g in generations], codec.pad_token_id, engine.device
    )
    rollout = join(prompts, [g.tokens for g in generations], codec.pad_token_id)
    pieces = engine.micro_batches(rollout.lengths())

    def total(index: torch.Tensor) -> torch.Tensor:
        piece = rollout.rows(index)
        return response_logprobs(reference.model, piece, temperature=temperature).sum(1).cpu()

    with engine.autocast():
        totals = engine.shared_out(total, pieces)
    return torch.cat(totals)[torch.cat(pieces).argsort()].tolist()


def save_generations(path: Path, generations: Sequence[Generation]) -> None:
    """Write a system's generations, whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(g), ensure_ascii=False) + "\n" for g in generations))


def load_generations(path: Path) -> list[Generation]:
    """Read what `save_generations` wrote; texts may hold line separators of Unicode, so only newlines part
    them.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [Generation(**json.loads(line)) for line in lines]
