"""stage=sft: supervised fine-tuning of a base model on demonstrations."""

from __future__ import annotations

import json

from rlhf.checks import print_checks
from rlhf.engine import build_engine, seed_everything
from rlhf.files import write_text
from rlhf.models.adapters import uses_lora
from rlhf.models.loading import check_context, load_codec, num_parameters
from rlhf.sft import SFT, sft_checks, tokenize
from rlhf.training import full_precision, model_card, write_model
from stages.common import Stage, resolved

NUM_EOS_SAMPLES = 48


def main(overrides: list[str]) -> None:
    """Fine-tune `policy` and leave a model folder for the next stages."""
    stage = Stage("sft", overrides)
    config, folder = stage.config, stage.folder
    config.policy = resolved(config.policy, config.model)
    parents = stage.find_parents()
    seed_everything(config.seed)
    codec = load_codec(config.policy, config)
    check_context("max_length", config.max_length, config.policy, config.model)
    train = stage.read(
        config.data.demonstrations.train, "demonstrations", "data.demonstrations.train", limit=config.examples
    )
    held_out = stage.read(
        config.data.demonstrations.eval,
        "demonstrations",
        "data.demonstrations.eval",
        limit=config.eval_examples,
    )
    stage.warn_of_overlap("data.demonstrations.train", train, "data.demonstrations.eval", held_out)
    rows, eval_rows = (tokenize(records, codec, config.max_length) for records in (train, held_out))
    stage.facts["cut"] = {
        "prompts": rows.num_cut_prompts,
        "responses": rows.num_cut_responses,
        "of": len(train),
    }
    if rows.num_cut_responses == len(train):
        raise ValueError(f"max_length={config.max_length} cuts the response of every demonstration: raise it")
    print(
        f"{len(train)} demonstrations; cut to max_length: {rows.num_cut_prompts} prompts, "
        f"{rows.num_cut_responses} responses"
    )

    full_weights = not uses_lora(config.adapter)
    size = num_parameters(config.policy, config.model)
    engine = build_engine(config.engine, size, full_weights=full_weights)
    stage.begin()
    run = SFT(config, codec, engine, {"train": rows.rows, "eval": eval_rows.rows}, folder)
    base_loss, loss = run.train(stage.state)
    samples = run.samples(held_out[:NUM_EOS_SAMPLES], config.data.max_response_tokens)
    checks = sft_checks(base_loss, loss, samples)
    shown = samples[: config.num_samples]
    for row in shown:
        print(f"  {row['prompt']} |{row['response']}")
    write_text(
        folder.path / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown)
    )

    model = full_precision(config, folder, run.model, base=config.policy, task="CAUSAL_LM")
    model.generation_config.eos_token_id = sorted({codec.eos_token_id, codec.tokenizer.eos_token_id})
    facts = {"demonstrations": len(train), "held-out loss": f"{loss:.4f} (base {base_loss:.4f})"}
    write_model(folder, model, codec.tokenizer, model_card("SFT policy", config, parents, facts))
    run.log.close()
    results = {"base_loss": base_loss, "loss": loss}
    folder.finish("policy", parents=parents, checks=checks, results=results, **stage.cost(), **stage.facts)
    folder.drop_states()
    print_checks(checks)
    print(f"held-out loss {base_loss:.3f} -> {loss:.3f}; model in {folder.model} ({stage.cost_in_words()})")
