"""stage=collect: samples of the SFT policy, ranked by the labeller, as records that stage=rm reads."""

from __future__ import annotations

from rlhf.checks import Check, print_checks
from rlhf.collect import collect_ranked
from rlhf.decoding import decoding_in
from rlhf.engine import build_engine, seed_everything
from rlhf.models.loading import load_causal_lm, load_codec, load_options, num_parameters
from rlhf.records import write_records
from rlhf.rewards import build_scorer
from rlhf.sampling.policy import Policy
from stages.common import Stage, resolved

LOWEST_SHARE_WITH_PAIR = 0.5


def main(overrides: list[str]) -> None:
    """Write `ranked.jsonl`: prompts with K samples, their scores and ranks."""
    stage = Stage("collect", overrides)
    config, folder = stage.config, stage.folder
    config.policy = resolved(config.policy, config.model)
    parents = stage.find_parents()
    seed_everything(config.seed)
    engine = build_engine(config.engine, num_parameters(config.policy, config.model))
    codec = load_codec(config.policy, config)
    prompts = stage.read(
        config.data.prompts.collect, "prompts", "data.prompts.collect", limit=config.num_prompts
    )
    labeller = build_scorer("labeller", config.labeller, config, engine, prompts)
    model = load_causal_lm(config.policy, load_options(config.model, engine, trained=False))
    stage.begin()
    (folder.path / "state").mkdir(exist_ok=True)
    lists = collect_ranked(
        Policy(model, codec, engine),
        prompts,
        labeller,
        folder.path / "state" / "partial.jsonl",
        decoding=decoding_in(config),
        samples_per_prompt=config.samples_per_prompt,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    stage.report_cut_prompts(codec)
    write_records(folder.path / "ranked.jsonl", lists)
    share = sum(record.has_pair for record in lists) / len(prompts)
    check = Check(
        "prompts with a ranked pair",
        share >= LOWEST_SHARE_WITH_PAIR,
        f"{share:.0%} of {len(prompts)}",
        "a labeller that ties its responses, or a policy that repeats itself, leaves nothing to learn from",
    )
    stage.facts["labeller"] = labeller.name
    folder.finish("records", parents=parents, checks=[check], **stage.cost(), **stage.facts)
    folder.drop_states()
    print_checks([check])
    print(f"{len(lists)} ranked lists in {folder.path / 'ranked.jsonl'} ({stage.cost_in_words()})")
