"""The passes of an evaluation: systems respond, responses are scored, exposure bias is measured.

What was done before is taken from the store.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlhf.engine import Engine
from rlhf.evaluation.compare import Scored
from rlhf.evaluation.exposure import Instruments, evidence_from, measure
from rlhf.evaluation.judge import Judgement, LanguageModelJudge, total
from rlhf.evaluation.store import Store, digest, model_id, scorer_id
from rlhf.evaluation.systems import Generation, System, choose, generate, reference_logprobs
from rlhf.evaluation.tables import OVERLAPS
from rlhf.metrics import progress
from rlhf.models.loading import load_causal_lm, load_codec, load_options, same_tokenizer
from rlhf.records import PromptRecord
from rlhf.reference_scorers import ReferenceScorer
from rlhf.rewards import checked_scores
from rlhf.sampling.policy import Policy


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What systems are compared on: the prompts, each once, and all rows, with their references; how models
    run, the policy that KL is measured to, the proxy and gold scorers (each None where there is none), and
    where results are kept.
    """

    config: Any
    engine: Engine
    records: Sequence[PromptRecord]
    rows: Sequence[PromptRecord]
    reference: str | None
    scorers: Mapping[str, Any]
    store: Store

    def policy(self, path: str, *, key: str = "systems") -> Policy:
        """A frozen policy from a checkpoint folder or hub name; the last one stays loaded."""
        return _load_policy(path, key, self)

    def facts(self, path: str) -> dict[str, Any]:
        """What the numbers that a model gives follow from, beside the texts."""
        data, model = self.config.data, self.config.model
        return {
            "model": model_id(path, model.revision if path == model.path else None),
            "engine": [self.engine.device.type, self.engine.dtype, model.attention],
            "texts": [data.format, data.max_prompt_tokens, data.max_response_tokens],
        }

    def scorer_id(self, key: str) -> Any:
        """What the scores of "proxy" or "gold" follow from."""
        if self.scorers[key] is None:
            return None
        return [scorer_id(getattr(self.config, key)), self.references()]

    def references(self) -> str:
        """What stands for all references to all prompts."""
        return digest([[row.prompt, row.reference] for row in self.rows])


@functools.lru_cache(maxsize=1)
def _load_policy(path: str, key: str, evaluation: Evaluation) -> Policy:
    config = evaluation.config
    model = load_causal_lm(path, load_options(config.model, evaluation.engine, trained=False), key=key)
    return Policy(model, load_codec(path, config), evaluation.engine)


def sample_all(
    evaluation: Evaluation, systems: Sequence[System], given: Mapping[System, list[Generation]]
) -> dict[System, list[Generation]]:
    """The responses of every system; those of some are given."""
    records = evaluation.records
    bar = progress(len(systems) * len(records), unit="response", description="evaluate")
    generations, pools = {}, {}
    for number, system in enumerate(systems, start=1):
        if system in given:
            generations[system] = given[system]
        else:
            pool = (system.path, system.decoding, system.draws)
            if pool not in pools:
                rows = _sampled(evaluation, system, bar)
                pools[pool] = rows, _scores(evaluation, "proxy", rows) if system.draws > 1 else None
            generations[system] = choose(system, *pools[pool])
        bar.update(number * len(records) - bar.n)
    bar.close()
    _load_policy.cache_clear()
    return generations


def _sampled(evaluation: Evaluation, system: System, bar: Any) -> list[Generation]:
    config = evaluation.config

    def sample() -> list[Generation]:
        options = {"batch_size": config.batch_size, "seed": config.seed}
        return generate(system, evaluation.policy(system.path), evaluation.records, bar=bar, **options)

    facts = evaluation.facts(system.path) | {
        "decoding": asdict(system.decoding),
        "prompts": digest([record.prompt for record in evaluation.records]),
        "draws": [config.seed, config.batch_size, system.draws],
    }
    return evaluation.store.kept(
        "generations",
        facts,
        sample,
        dump=lambda rows: [asdict(row) for row in rows],
        load=lambda rows: [Generation(**row) for row in rows],
    )


def score_all(evaluation: Evaluation, generations: Mapping[System, list[Generation]]) -> list[Scored]:
    """Proxy and gold scores of all responses, their log-ratios to the reference policy, and how near they are
    to the references.
    """
    records = evaluation.records
    known = [i for i, record in enumerate(records) if (record.reference or "").strip()]
    referenced = [row for row in evaluation.rows if (row.reference or "").strip()]
    overlaps = [ReferenceScorer(kind, referenced) for kind in (OVERLAPS if known else ())]
    bar, results = progress(len(generations), unit="system", description="score"), []
    for system, rows in generations.items():
        try:
            scores = {key: _scores(evaluation, key, rows) for key in evaluation.scorers}
        except ValueError as error:
            raise ValueError(f"systems.{system.name}: {error}") from error
        answered = [rows[i].prompt for i in known], [rows[i].response for i in known]
        overlap = {scorer.name: scorer(*answered) for scorer in overlaps}
        ratios = None if system.is_saved else _log_ratios(evaluation, system, rows)
        results.append(Scored(system, rows, scores["proxy"], scores["gold"], ratios, overlap=overlap))
        bar.update()
    bar.close()
    return results


def _scores(evaluation: Evaluation, key: str, rows: Sequence[Generation]) -> list[float] | None:
    scorer, spec = evaluation.scorers[key], getattr(evaluation.config, key)
    prompts, texts = [row.prompt for row in rows], [row.response for row in rows]
    if scorer is None:
        return None
    if spec["kind"] != "model":  # nothing else takes long
        return checked_scores(scorer, prompts, texts).tolist()
    facts = evaluation.facts(spec["path"]) | {"rows": digest([prompts, texts])}
    return evaluation.store.kept("scores", facts, lambda: checked_scores(scorer, prompts, texts).tolist())


def _log_ratios(evaluation: Evaluation, system: System, rows: Sequence[Generation]) -> list[float] | None:
    config, reference = evaluation.config, evaluation.reference
    if reference is None or not same_tokenizer(system.path, reference, config.model):
        return None
    temperature = config.decoding.temperature
    facts = evaluation.facts(reference) | {
        "temperature": temperature,
        "rows": digest([[row.prompt, row.tokens] for row in rows]),
    }
    logprobs = evaluation.store.kept(
        "logprobs",
        facts,
        lambda: reference_logprobs(evaluation.policy(reference), rows, temperature=temperature),
    )
    pairs = zip(rows, logprobs, strict=True)
    return [row.logprob - logprob for row, logprob in pairs if row.logprob is not None]


def judge_all(
    judge: LanguageModelJudge, scored: Sequence[Scored], baseline: str
) -> tuple[dict[str, Judgement], dict[str, Any]]:
    """What a language model says of every system against the baseline, and how reliable it was."""
    [base] = [each.generations for each in scored if each.system.name == baseline]
    base = base[: judge.settings.num_prompts]
    others = [each for each in scored if each.system.name != baseline]
    bar, found = progress(2 * len(base) * len(others), unit="question", description="judge"), {}
    prompts, theirs = [row.prompt for row in base], [row.response for row in base]
    for each in others:
        ours = [row.response for row in each.generations[: len(base)]]
        found[each.system.name] = judge.judge(prompts, ours, theirs, bar)
    bar.close()
    return found, {"model": judge.settings.model, "cost": judge.cost_of_all(), **total(found.values())}


def measure_all(evaluation: Evaluation, scored: Sequence[Scored], oracle: str | None) -> list[Scored]:
    """The systems with the evidence of their exposure bias, by an oracle (folder or hub name) and gold."""
    config, found = evaluation.config, []
    lengths = config.prefix_lengths or []
    if oracle is None and not lengths:
        return list(scored)

    @functools.cache
    def judge() -> Policy | None:
        return None if oracle is None else evaluation.policy(oracle, key="oracle")

    bar = progress(len(scored), unit="system", description="exposure bias")
    gold_kl: dict[str, Any] = {}  # of a policy, whatever its decoding
    for each in scored:
        system, rows = each.system, each.generations
        if system.is_saved:
            found.append(each)
            bar.update()
            continue
        fits = oracle is not None and same_tokenizer(system.path, oracle, config.model)
        facts = evaluation.facts(system.path) | {
            "oracle": evaluation.facts(oracle)["model"] if oracle is not None and fits else None,
            "decoding": [asdict(system.decoding), system.best_of],
            "gold": evaluation.scorer_id("gold") if lengths else None,
            "rows": digest([[row.prompt, row.tokens] for row in rows]),
            "references": evaluation.references(),
            "draws": [config.seed, config.batch_size, lengths],
        }

        def take(each: Scored = each, *, fits: bool = fits) -> Any:
            own = Instruments(
                judge() if fits else None, evaluation.scorers["gold"], lengths, config.batch_size, config.seed
            )
            policy, known = evaluation.policy(each.system.path), gold_kl.get(each.system.path)
            return measure(each.system, policy, each.generations, evaluation.records, own, gold_kl=known)

        evidence = evaluation.store.kept("exposure", facts, take, dump=asdict, load=evidence_from)
        gold_kl[system.path] = evidence.gold_kl
        found.append(replace(each, evidence=evidence))
        bar.update()
    bar.close()
    _load_policy.cache_clear()
    return found
