"""Defects found in other PPO implementations, each a test here or, in this table, a test elsewhere.

No gradient clipping
    -> test_ppo.py::test_policy_and_critic_are_both_clipped_and_both_move
Resume restarts at step 0; the critic is not saved
    -> test_ppo.py::test_a_run_that_goes_on_equals_one_that_never_stopped
The score stands one past EOS
    -> test_ppo.py::test_kl_and_rewards_before_the_first_step_are_the_scores_alone
    -> numerics/test_advantages.py::test_the_score_stands_on_the_last_real_token_and_nan_padding_stays_out
More than one minibatch does nothing
    -> test_ppo.py::test_an_update_makes_epochs_times_minibatches_steps
    -> test_ppo.py::test_every_episode_is_learned_from_once_an_epoch
Reward and policy must share a tokenizer
    -> test_chain.py::test_the_reward_model_may_have_another_tokenizer
Validation is rejected: a policy is measured on prompts that no stage trained on
    -> test_chain.py::test_report_has_what_scripts_read
"""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.batches import join, left_pad
from rlhf.decoding import Decoding
from rlhf.engine import Engine, seed_everything
from rlhf.experience import build_experience, experience_metrics
from rlhf.ppo import Learner
from rlhf.records import RankedList
from rlhf.rewards import RewardModelScorer, score_samples
from rlhf.rm import tokenize
from rlhf.sampling.sampler import draw_uniforms, sample
from rlhf.text import TextCodec
from tests.models.families import EOS, PAD, VOCABULARY, load, word_tokenizer, write_family
from tests.test_ppo import PROMPTS, experience_of, roles_of, run_of, settings

V = len(VOCABULARY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families")
    for family in ("llama", "gpt2"):
        write_family(path, family)
    return path


def test_the_tests_of_the_table_exist() -> None:
    """A row of the table above that names no test."""
    rows = [line.split("-> ")[1].split("::") for line in str(__doc__).splitlines() if "-> " in line]
    assert len(rows) == 8
    for file, name in rows:
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), name


def test_kl_coefficient_and_random_generators_are_in_the_saved_state(folder: Path, tmp_path: Path) -> None:
    """The KL coefficient and the random generators are not in the saved state."""

    def draws() -> list[float]:
        return [random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]

    kl = copy.deepcopy(settings(folder).kl)
    kl.controller, kl.coef, kl.target, kl.horizon = "adaptive", 0.1, 1e-6, 60
    run = run_of(folder, tmp_path, kl=kl)
    run.step(1)
    run.save(1)
    assert run.kl.coef == pytest.approx(0.098)  # .1 * (1 - .2 * 6 / 60)
    expected = draws()
    again = run_of(folder, tmp_path, kl=kl)
    seed_everything(99)
    assert again.restore(tmp_path / "x" / "ppo" / "state" / "step_1") == 1
    assert again.kl.coef == run.kl.coef and draws() == expected


def test_whitening_is_over_the_whole_batch_not_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whitening per process, minibatch or micro-batch, which gives every piece its own scale."""
    config = settings(folder, epochs=1, minibatches=3, whiten_advantages=False)
    roles = roles_of(config, micro_batch_size=2)
    plain = experience_of(roles, config)
    config.whiten_advantages = True
    experience = experience_of(roles, config)
    mask = experience.rollout.response_mask
    # One mean and one scale for all tokens, whichever piece they are in.
    mean, scale = plain.advantages[mask].mean(), plain.advantages[mask].std(correction=0)
    torch.testing.assert_close(
        experience.advantages[mask] * scale + mean, plain.advantages[mask], rtol=0, atol=1e-4
    )
    pieces = [experience.advantages[i : i + 2][mask[i : i + 2]].mean().abs() for i in (0, 2, 4)]
    assert max(pieces) > 0.1, "every piece has mean 0 already: the test shows nothing"

    learned: list[Tensor] = []
    policy_terms = Learner.policy_terms

    def record(learner: Learner, logprobs: Tensor, entropies: Tensor, piece: Any, **more: Any) -> Tensor:
        learned.append(piece.advantages[piece.rollout.response_mask])
        return policy_terms(learner, logprobs, entropies, piece, **more)

    monkeypatch.setattr(Learner, "policy_terms", record)
    monkeypatch.setattr("rlhf.ppo.policy_loss", noted(learned))
    Learner(roles.actor_critic, roles.engine, config).update(experience, step=1)
    assert len(learned) == 6
    for found in (learned[::2], learned[1::2]):
        assert torch.cat(found).sort().values.equal(experience.advantages[mask].sort().values)


def noted(learned: list[Tensor]) -> Callable[..., Any]:
    """The policy loss, which notes the advantages that reach it."""
    from rlhf.numerics.losses import policy_loss

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **more: Any) -> Any:
        learned.append(advantages[mask])
        return policy_loss(logprobs, old, advantages, mask, **more)

    return loss


def test_entropy_ratio_and_approx_kl_are_means_over_real_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropy, ratio and approx-KL averaged over padding, where padded log-probs held a filler of 1.0."""
    config = settings(folder)
    roles = roles_of(config)
    models = roles.actor_critic
    experience = experience_of(roles, config)
    learner = Learner(models, roles.engine, config)
    learner.update(experience, step=1)
    rows = [experience.rows(torch.tensor([i])) for i in range(6)]  # each without padding
    with torch.no_grad():
        outputs = [models.logprobs_and_entropy(row.rollout, temperature=config.temperature) for row in rows]
    ratios = torch.cat([(new - row.logprobs)[0].exp() for (new, _), row in zip(outputs, rows, strict=True)])
    expected = {
        "entropy": torch.cat([entropies[0] for _, entropies in outputs]).mean(),
        "ratio": ratios.mean(),
        "approx_kl": (ratios - 1 - ratios.log()).mean(),
    }
    mask = experience.rollout.response_mask
    assert not mask.all() and ratios.std() > 1e-3

    def filled(rollout: Any, **options: Any) -> tuple[Tensor, Tensor]:
        padding = ~rollout.response_mask
        logprobs, entropies = original(rollout, **options)
        return logprobs.masked_fill(padding, 1.0), entropies.masked_fill(padding, 1.0)

    original = models.logprobs_and_entropy
    monkeypatch.setattr(models, "logprobs_and_entropy", filled)
    found = learner.minibatch(replace(experience, logprobs=experience.logprobs.masked_fill(~mask, -1.0)))
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_the_last_batch_steps_once_however_many_micro_batches_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every micro-batch steps on a loader's last batch."""
    config = settings(folder, epochs=2, minibatches=2)
    roles = roles_of(config, micro_batch_size=2)
    learner = Learner(roles.actor_critic, roles.engine, config)
    events: list[Any] = []
    policy_terms = learner.policy_terms

    def record(logprobs: Tensor, entropies: Tensor, piece: Any, **more: Any) -> Tensor:
        events.append(len(piece.scores))
        return policy_terms(logprobs, entropies, piece, **more)

    monkeypatch.setattr(learner, "policy_terms", record)
    learner.optimizer.register_step_post_hook(lambda *_: events.append("step"))
    learner.update(experience_of(roles, config), step=1)
    assert events == [2, 1, "step"] * 4


def test_generation_stops_at_eos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation of a fixed length that never stops at EOS."""
    batches: list[int] = []

    def logits(model: Any, states: Tensor) -> Tensor:
        """Rows 0 to 2 end with their second token, the others with their fourth."""
        batches.append(len(states))
        tokens = torch.full((len(states),), 9)
        if len(batches) == 2:
            tokens[:3] = EOS
        if len(batches) == 4:
            tokens[:] = EOS
        return 100.0 * torch.nn.functional.one_hot(tokens, V)

    monkeypatch.setattr("rlhf.sampling.sampler.logits_of", logits)
    rollout = sample(
        load(folder, "llama"),
        PROMPTS,
        Decoding(40),
        eos_token_id=EOS,
        pad_token_id=PAD,
        uniforms=draw_uniforms(6, 40, seed=0),
    )
    assert rollout.responses() == [[9, EOS]] * 3 + [[9, 9, 9, EOS]] * 3
    assert batches == [6, 6, 3, 3], "rows that have ended were generated on"


class LiveLogits(TorchDispatchMode):
    """The most rows of a vocabulary's width that were in memory at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == V:
                self.live[StorageWeakRef(tensor.untyped_storage())] = tensor.numel() // V
        self.live = {reference: rows for reference, rows in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_scores_over_the_vocabulary_are_never_kept_for_the_whole_rollout(folder: Path) -> None:
    """Full-vocabulary scores of the whole rollout are kept in memory while it is scored and learned from."""
    # In the tiny GPT-2 no other tensor is as wide as the vocabulary.
    config = settings(folder, family="gpt2", epochs=1, minibatches=1)
    peaks = {}
    for times in (2, 8):
        roles = roles_of(config, micro_batch_size=4)
        rollout = join(left_pad(PROMPTS * times, PAD), [[9, 7, 11, 5, 6, 8, 12, EOS]] * 6 * times, PAD)
        with LiveLogits() as memory:
            experience = build_experience(roles, rollout, torch.ones(6 * times), config=config, kl_coef=0.1)
            Learner(roles.actor_critic, roles.engine, config).update(experience, step=1)
        peaks[times] = memory.peak
    # 96 and 384 tokens, 32 of them in a pass: a few copies of these are all there is.
    assert 32 <= peaks[2] == peaks[8] < 8 * 32


def test_scores_over_the_vocabulary_are_never_kept_while_sampling(folder: Path) -> None:
    """Full-vocabulary scores of every step are kept in memory while the rollout is sampled."""
    model, peaks = load(folder, "gpt2"), {}
    for length in (4, 32):
        with LiveLogits() as memory:
            sample(
                model,
                PROMPTS * 8,
                Decoding(length),
                eos_token_id=V,  # no token: no row ends
                pad_token_id=PAD,
                uniforms=draw_uniforms(48, length, seed=0),
            )
        peaks[length] = memory.peak
    assert 48 <= peaks[4] == peaks[32]


def test_the_reward_model_is_trained_on_the_tokens_that_it_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward model is trained on tokenize(prompt + response) but scores concatenated tokens."""
    codec = TextCodec(word_tokenizer(), style="plain")
    prompt, texts = "w1 w5", ("w7 w9", "w3")
    trained = tokenize([RankedList(prompt, texts, (1, 2))], codec, 40).rows[0].tokens
    joint = codec.tokenizer(prompt + texts[0])["input_ids"]
    apart = codec.encode_prompt(prompt) + codec.encode_response(texts[0], add_eos=False)
    assert joint != apart, "both ways give the same tokens: the test shows nothing"

    scored: list[list[int]] = []

    def record(model: Any, rows: Any, **more: Any) -> Tensor:
        scored.extend(list(row) for row in rows)
        return torch.zeros(len(rows))

    monkeypatch.setattr("rlhf.rewards.score_rows", record)
    engine = Engine(torch.device("cpu"), torch.float32)
    scorer = RewardModelScorer(load(folder, "llama"), codec, engine, name="rm")
    scorer([prompt] * 2, texts)
    rollout = join(
        left_pad([codec.encode_prompt(prompt)] * 2, PAD), [codec.encode_response(t) for t in texts], PAD
    )
    score_samples(scorer, codec, [prompt] * 2, rollout)
    assert scored == trained * 2


def test_a_mean_reward_does_not_rise_with_length(folder: Path) -> None:
    """A mean reward that rises because length rises."""
    config = settings(folder)
    roles = roles_of(config)
    scores = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -2.0])
    for moved in (False, True):
        for length in (1, 4, 8):
            rollout = join(left_pad(PROMPTS, PAD), [[9] * (length - 1) + [EOS]] * 6, PAD)
            experience = build_experience(roles, rollout, scores, config=config, kl_coef=0.5)
            metrics = experience_metrics(experience, EOS)
            assert metrics["length"] == length and metrics["score"] == pytest.approx(0.5 / 6)
            # What the policy is paid is the score less the KL of the sequence, at any length.
            assert metrics["reward"] == pytest.approx(0.5 / 6 - 0.5 * metrics["kl"], abs=1e-5)
            assert (abs(metrics["kl"]) > 0.01) == moved
        Learner(roles.actor_critic, roles.engine, config).update(experience, step=2)
