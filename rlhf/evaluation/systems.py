"""The systems that are compared: a checkpoint with a way of decoding, and its samples on the evaluation
prompts.

P prompts, R response positions. All systems see the same prompts, the same length limit and the same random
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch

from rlhf.batches import Rollout, join, left_pad
from rlhf.decoding import Decoding, system_decoding
from rlhf.models.forward import response_logprobs
from rlhf.parents import kept_policies
from rlhf.processes import ALONE
from rlhf.records import PromptRecord, make_sources, prompt_key, read_records
from rlhf.rows import shorten
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec

Tokens: TypeAlias = Sequence[list[int]]
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class System:
    """A checkpoint (folder or hub name), how it decodes, and whether the best of n samples is taken, those
    being the first of `pool`; or, with `is_saved`, a file of responses that came from elsewhere.

    One of a family of systems, the checkpoints of a run or best-of-n for several n, has its name in `curve`,
    its update in `update`, and in `origin` the policy that it comes from.
    """

    name: str
    path: str
    decoding: Decoding
    best_of: int = 1
    is_saved: bool = False
    pool: int | None = None
    curve: str | None = None
    update: int | None = None
    origin: str | None = None

    @property
    def draws(self) -> int:
        """Samples per prompt."""
        return self.pool or self.best_of


@dataclass(frozen=True)
class Generation:
    """One response of a system: its text and tokens, whether it ended, and its log-prob under the way it was
    decoded; the last two are None where it came from elsewhere.
    """

    prompt: Any
    response: str
    tokens: list[int]
    ended: bool | None
    logprob: float | None


def build_systems(specs: dict[str, Any], decoding: Decoding) -> list[System]:
    """Systems from the `systems` key: a path, {path, decoding: {...}, best_of: n, or a list of them},
    {generations: file}, or {checkpoints: folder of a PPO run}, whose model has the name alone.

    Raises ValueError for a name that two of them would have.
    """
    systems: list[System] = []
    for name, spec in specs.items():
        spec = {"path": spec} if isinstance(spec, str) else spec
        if "generations" in spec:
            systems.append(System(name, spec["generations"], decoding, is_saved=True))
        elif "checkpoints" in spec:
            origin, kept = kept_policies(f"systems.{name}.checkpoints", spec["checkpoints"])
            for update, path in kept.items():
                own_name = name if path.name == "model" else f"{name}_{update}"
                systems.append(
                    System(own_name, str(path), decoding, curve=name, update=update, origin=origin)
                )
        else:
            own, best_of = system_decoding(name, spec.get("decoding"), decoding), spec.get("best_of") or 1
            if isinstance(best_of, list):
                pool = max(best_of)
                systems += [
                    System(f"{name}_{n}", spec["path"], own, n, pool=pool, curve=name, origin=spec["path"])
                    for n in sorted(best_of)
                ]
            else:
                systems.append(System(name, spec["path"], own, best_of))
    names = [system.name for system in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"systems: two would be called {twice[0]}; give one of them another name")
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
    batch_size: int,
    seed: int,
    bar: Any,
) -> list[Generation]:
    """A system's `draws` responses to each prompt, those of a prompt one after another."""
    per_batch = max(1, batch_size // (system.draws * system.decoding.num_beams))

    def sampled(own: Policy, start: int, batch: Sequence[PromptRecord]) -> list[Generation]:
        prompts = [record.prompt for record in batch for _ in range(system.draws)]
        return _generations(
            prompts, own.respond(prompts, system.decoding, seed=seed * 1_000_003 + start), own
        )

    return [row for found in by_batches(policy, records, per_batch, sampled, bar) for row in found]


def choose(system: System, rows: Sequence[Generation], scores: Sequence[float] | None) -> list[Generation]:
    """Of a system's `draws` responses to each prompt the one of the first `best_of` that has most."""
    if system.draws == 1:
        return list(rows)
    assert scores is not None, system
    starts = range(0, len(rows), system.draws)
    return [rows[max(range(start, start + system.best_of), key=scores.__getitem__)] for start in starts]


def by_batches(
    policy: Policy,
    items: Sequence[T],
    per_batch: int,
    function: Callable[[Policy, int, Sequence[T]], list[U]],
    bar: Any | None = None,
) -> list[list[U]]:
    """What `function` of a policy, a batch's first place and its items gives, batch after batch.

    A process takes whole batches, so that the numbers are the same, to the last digit, for any number of
    processes.
    """
    processes, by_itself = policy.engine.processes, replace(policy.engine, processes=ALONE)
    own = replace(policy, engine=by_itself)
    starts = range(0, len(items), per_batch)
    mine, num_left = [], len(items)
    for start in processes.share(starts):
        batch = items[start : start + per_batch]
        mine.append(function(own, start, batch))
        num_left -= len(batch)
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.update(num_left)
    return processes.gathered(mine, len(starts))


def _generations(prompts: Sequence[Any], rollout: Rollout, policy: Policy) -> list[Generation]:
    assert rollout.behaviour_logprobs is not None
    logprobs = rollout.behaviour_logprobs.sum(1).tolist()
    columns = (prompts, policy.texts(rollout), rollout.responses(), policy.ended(rollout), logprobs)
    return [Generation(*row) for row in zip(*columns, strict=True)]


def reference_logprobs(
    reference: Policy, generations: Sequence[Generation], *, temperature: float
) -> list[float]:
    """Log-probs (P,) of whole responses under a reference policy with the same tokenizer."""
    contexts = [reference.codec.encode_prompt(g.prompt) for g in generations]
    rows = token_logprobs(reference, contexts, [g.tokens for g in generations], temperature=temperature)
    return [sum(row) for row in rows]


def token_logprobs(
    policy: Policy, contexts: Tokens, responses: Tokens, *, temperature: float = 1.0
) -> list[list[float]]:
    """Log-probs in nats of each response's tokens after its context: a list of as many numbers."""

    def of_piece(piece: Rollout) -> torch.Tensor:
        return response_logprobs(policy.model, piece, temperature=temperature)

    rows = by_rows(policy, contexts, responses, of_piece)
    return [row[: len(response)] for row, response in zip(rows, responses, strict=True)]


@torch.no_grad()
def by_rows(
    policy: Policy, contexts: Tokens, responses: Tokens, function: Callable[[Rollout], torch.Tensor]
) -> list[list[float]]:
    """What `function` of some rows gives, (B, ...) for B of them, row after row; padding is that of a piece.

    All processes share the passes; which rows share one does not depend on how many they are.
    """
    if not contexts:
        return []
    engine, pad = policy.engine, policy.codec.pad_token_id
    rollout = join(left_pad(list(contexts), pad, engine.device), list(responses), pad)
    pieces = engine.micro_batches(rollout.lengths())
    with engine.autocast():
        found = engine.shared_out(lambda index: function(rollout.rows(index)), pieces)
    rows = [row for piece in found for row in piece.tolist()]
    return [rows[place] for place in torch.cat(pieces).argsort().tolist()]


def saved_responses(
    system: System, records: Sequence[PromptRecord], codec: TextCodec, *, on_bad_row: str
) -> list[Generation]:
    """The responses of a file to all prompts, of several to one prompt the first; tokens are the codec's.

    Raises ValueError for a prompt that it has no response to.
    """
    key = f"systems.{system.name}.generations"
    given: dict[str, str] = {}
    rows = read_records(make_sources(system.path, key), "responses", on_bad_row=on_bad_row).records
    for row in rows:
        given.setdefault(prompt_key(row.prompt), row.response)
    if more := len(rows) - len(given):
        print(f"{key}={system.path}: {more} rows are not used, whose prompt stands there before", flush=True)
    missing = [record for record in records if prompt_key(record.prompt) not in given]
    if missing:
        raise ValueError(
            f"{key}={system.path} has no response to {len(missing)} of {len(records)} prompts, the first of "
            f"them {shorten(missing[0].prompt)}; give it rows with `prompt` and `response` for all of them"
        )
    texts = [given[prompt_key(record.prompt)] for record in records]
    return [
        Generation(record.prompt, text, codec.encode_response(text), None, None)
        for record, text in zip(records, texts, strict=True)
    ]
