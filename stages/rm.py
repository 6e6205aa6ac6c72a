"""stage=rm: a reward model trained on ranked lists, judged on held-out prompts, its scores normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf.checks import print_checks
from rlhf.engine import build_engine, seed_everything
from rlhf.evaluation.rankings import (
    accuracy_by_gap,
    length_gaps,
    pair_accuracy,
    ranking_checks,
    score_length_correlation,
    tfidf_gaps,
    untied_pairs,
)
from rlhf.models.adapters import uses_lora
from rlhf.models.loading import check_context, load_codec, num_parameters
from rlhf.numerics.ranking import calibration
from rlhf.records import RankedList, prompt_key
from rlhf.rm import (
    RewardTraining,
    calibrate,
    calibration_rows,
    check_calibration_policy,
    check_margins,
    prepare_for_saving,
    score_rows,
    tokenize,
)
from rlhf.text import TextCodec
from rlhf.training import full_precision, model_card, write_model
from stages.common import Stage, resolved


def main(overrides: list[str]) -> None:
    """Train a score head (and trunk or adapter) on ranked lists and leave a reward model."""
    stage = Stage("rm", overrides)
    config, folder = stage.config, stage.folder
    config.base = resolved(config.base, config.model)
    parents = stage.find_parents()
    if config.calibration_policy is not None:
        config.calibration_policy = resolved(config.calibration_policy, config.model)
        check_calibration_policy(config)
    seed_everything(config.seed)
    codec = load_codec(config.base, config)
    check_context("max_length", config.max_length, config.base, config.model)
    train_records, held_out_records = _read_lists(stage)
    train, held_out = (
        tokenize(records, codec, config.max_length) for records in (train_records, held_out_records)
    )
    report_lists(stage, train_records, train, held_out_records, held_out)

    full_weights = not uses_lora(config.adapter)
    engine = build_engine(config.engine, num_parameters(config.base, config.model), full_weights=full_weights)
    check_margins(config, train.rows)
    stage.begin()
    run = RewardTraining(config, codec, engine, train.rows, folder)
    run.train(stage.state)
    model = (
        full_precision(config, folder, run.model, base=config.base, task="SEQ_CLS").to(engine.device).eval()
    )
    samples = calibration_rows(config, codec, engine, held_out)
    stage.facts["normalisation"] = calibrate(model, samples, pad_token_id=codec.pad_token_id, engine=engine)
    results, checks = judge(model, codec.pad_token_id, engine, train.records, held_out)
    facts = {
        "lists": f"{len(train.rows)} of {config.ranked.train}",
        "held-out accuracy": f"{results['accuracy']['mean']:.3f}",
    }
    tokenizer = prepare_for_saving(model, codec)
    card = model_card("Reward model", config, parents, facts, use=how_to_score(codec))
    write_model(folder, model, tokenizer, card)
    run.log.close()
    folder.finish(
        "reward_model", parents=parents, checks=checks, results=results, **stage.cost(), **stage.facts
    )
    folder.drop_states()
    print_checks(checks)
    print(
        f"held-out accuracy {results['accuracy']['mean']:.3f}; "
        f"model in {folder.model} ({stage.cost_in_words()})"
    )


def how_to_score(codec: TextCodec) -> str:
    """The part of the model card that says what the model reads."""
    end = codec.tokenizer.convert_ids_to_tokens(codec.eos_token_id)
    before = (
        "the turns in the tokenizer's chat template"
        if codec.uses_chat
        else "prompt and response as they join"
    )
    return (
        f"The score is the one logit of `AutoModelForSequenceClassification`. It reads {before}, then the "
        f"end token `{end}` and nothing behind it: without that token scores are off."
    )


def report_lists(stage: Stage, *parts: Any) -> None:
    """Say what was cut from the training and the held-out part; refuse a part without a list."""
    train_records, train, held_out_records, held_out = parts
    stage.facts["cut"] = {}
    for name, records, lists in (("train", train_records, train), ("held out", held_out_records, held_out)):
        stage.facts["cut"][name] = {
            "lists": len(records),
            "lists without two ranks": len(records) - len(lists.rows),
            "prompts cut": lists.num_cut_prompts,
            "responses left out": lists.num_long_responses,
        }
        words = (
            f"{name}: {len(lists.rows)} of {len(records)} ranked lists have responses that differ in rank; "
            f"{lists.num_cut_prompts} prompts cut, {lists.num_long_responses} responses longer than "
            f"max_length={stage.config.max_length} and left out"
        )
        if not records:
            raise ValueError(f"{name}: no ranked list is left; change eval_fraction, or give more lists")
        if not lists.rows:
            raise ValueError(f"{words}; raise max_length, or give lists with ranks that differ")
        print(words, flush=True)


def _read_lists(stage: Stage) -> tuple[Sequence[RankedList], Sequence[RankedList]]:
    """Training and held-out lists; without a held-out source a share of the prompts is held out."""
    config = stage.config
    records = stage.read(config.ranked.train, "ranked", "ranked.train")
    if config.ranked.eval is not None:
        held_out = stage.read(config.ranked.eval, "ranked", "ranked.eval")
        stage.warn_of_overlap("ranked.train", records, "ranked.eval", held_out)
        return records, held_out
    keys = sorted({prompt_key(record.prompt) for record in records})
    held_out_keys = set(keys[: max(1, round(len(keys) * config.eval_fraction))])
    parts: tuple[list[RankedList], list[RankedList]] = ([], [])
    for record in records:
        parts[prompt_key(record.prompt) in held_out_keys].append(record)
    return parts


def judge(
    model: Any, pad_token_id: int, engine: Any, train: Sequence[RankedList], held_out: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Accuracy and calibration on held-out lists beside the two baselines, and the checks drawn from them."""
    flat = [tokens for row in held_out.rows for tokens in row.tokens]
    scores = score_rows(model, flat, pad_token_id=pad_token_id, engine=engine, description="judging").cpu()
    alone = torch.cat(
        [score_rows(model, [row], pad_token_id=pad_token_id, engine=engine).cpu() for row in flat[:8]]
    )
    by_list = torch.split(scores, [len(row.tokens) for row in held_out.rows])
    pairs = untied_pairs(held_out.records)
    prompts = np.array([pair.prompt for pair in pairs])
    gaps = np.array(
        [float(by_list[p.prompt][p.better_index] - by_list[p.prompt][p.worse_index]) for p in pairs]
    )
    accuracy, longer, tfidf = (
        pair_accuracy(values, prompts) for values in (gaps, length_gaps(pairs), tfidf_gaps(train, pairs))
    )
    texts = [text for record in held_out.records for text in record.responses]
    results = {
        **calibration(torch.from_numpy(gaps)),
        "accuracy": vars(accuracy),
        "longer_wins": vars(longer),
        "tfidf": vars(tfidf),
        "accuracy_by_gap": accuracy_by_gap(gaps, held_out.records, pairs),
        "score_length_correlation": score_length_correlation(scores.tolist(), texts),
        "pairs": len(pairs),
    }
    tolerance = 1e-4 if engine.dtype == torch.float32 else 0.2
    invariance = float((alone - scores[:8]).abs().max())
    return results, ranking_checks(accuracy, longer, tfidf, invariance, tolerance)
