"""trl's own GRPO and RLOO gradients against the closed forms of `theory`: one prompt, two answers of one token."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.special import expit
from scipy.stats import binom
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from nondecoupling.analysis import theory

G, BETA = 8, 0.5
LOG_ODDS, START, Q = 2.0, 0.0, 0.95  # of answer 1: under the policy and its reference; and how often the label is 1
QUESTION = [0, 1, 0]
BATCHES, GROUPS = 30, 100  # of the sampled test

VARIANTS = {  # what trl is told, and what the theory calls it
    "this study": ({"beta": BETA * (G - 1) / G, "loss_type": "dr_grpo", "scale_rewards": "none"}, {}),
    "beta not scaled": ({"beta": BETA, "loss_type": "dr_grpo", "scale_rewards": "none"}, {}),
    "group": ({"beta": BETA, "loss_type": "dapo", "scale_rewards": "group"}, {"normalised": True}),
    "uncorrected": (
        {"beta": BETA, "loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": False},
        {"corrected": False},
    ),
    "group, uncorrected": (
        {"beta": BETA, "loss_type": "dapo", "scale_rewards": "group", "use_bias_correction_kl": False},
        {"normalised": True, "corrected": False},
    ),
    "rloo": ({"beta": BETA}, {}),
}


class Oracle(NamedTuple):
    """A trainer, the answers that it will be handed instead of sampling, and the gradient of the log-odds."""

    trainer: GRPOTrainer | RLOOTrainer
    handed: list[list[int]]
    direction: torch.Tensor


def set_log_odds(model: Qwen3ForCausalLM, value: float) -> None:
    """Choose the output layer so that answer 1 to the question has these log-odds against answer 0."""
    with torch.no_grad():
        state = model.model(torch.tensor([QUESTION])).last_hidden_state[0, -1]
        model.lm_head.weight.copy_(torch.stack([-state, state]) * value / (2 * state @ state))


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters()]).double()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder of a Qwen3 of two tokens: with nothing else to say it is a two-label policy. trl loads it as reference."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    config = Qwen3Config(vocab_size=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, **shape)
    model = Qwen3ForCausalLM(config)
    set_log_odds(model, START)
    folder = tmp_path_factory.mktemp("oracle")
    model.save_pretrained(folder)
    return folder


def handed_trainer(rloo, model, reward, folder, told, **known):
    """trl's own trainer, which takes its answers from a list instead of sampling them; the trainer and that list."""
    handed: list[list[int]] = []

    class HandedRLOOTrainer(RLOOTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
            return handed

        def _tokenize_prompts(self, prompts):
            return [QUESTION] * len(prompts), None, {}

    def hand_over(prompts, trainer):
        return {"prompt_ids": [QUESTION] * len(prompts), "completion_ids": handed, "logprobs": None}

    config = (RLOOConfig if rloo else GRPOConfig)(
        output_dir=str(folder),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        **told,
    )
    if rloo:
        trainer = HandedRLOOTrainer(model, reward, config, **known)
    else:
        trainer = GRPOTrainer(model, reward, config, rollout_func=hand_over, **known)
    trainer.current_gradient_accumulation_steps = 1  # which trainer.train() would set
    return trainer, handed


@pytest.fixture(scope="module")
def oracle(reference):
    """``Oracle`` of each of VARIANTS, made once."""
    words = Tokenizer(models.WordLevel({"no": 0, "yes": 1}, unk_token="no"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="no", pad_token="no")
    made = {}

    def make(variant):
        if variant in made:
            return made[variant]

        def agreement(completion_ids, label, **_):
            return [1.0 if answer == [gold] else -1.0 for answer, gold in zip(completion_ids, label, strict=True)]

        model = Qwen3ForCausalLM.from_pretrained(reference)
        set_log_odds(model, LOG_ODDS)
        told = {"num_generations": G, "per_device_train_batch_size": GROUPS * G, "max_completion_length": 1}
        known = {"train_dataset": Dataset.from_dict({"prompt": ["no"], "label": [1]}), "processing_class": tokenizer}
        settings = told | VARIANTS[variant][0]
        trainer, handed = handed_trainer(variant == "rloo", model, agreement, reference, settings, **known)
        no, yes = model.train()(torch.tensor([QUESTION])).logits[0, -1]
        (yes - no).backward()
        made[variant] = Oracle(trainer, handed, flat_gradient(model))
        return made[variant]

    return make


def gradient_of_log_odds(oracle: Oracle, groups: list[tuple[int, ...]], labels: list[int]) -> float:
    """What trl does with these groups: minus the gradient of its loss, as a multiple of that of the log-odds."""
    trainer, handed, direction = oracle
    handed[:] = [[answer] for group in groups for answer in group]
    inputs = [{"prompt": "no", "label": label} for label in labels for _ in range(G)]
    trainer.model.zero_grad()
    batch = trainer._generate_and_score_completions(inputs)  # rewards, advantages, the reference: all trl's
    trainer.compute_loss(trainer.model, batch).backward()
    found = -flat_gradient(trainer.model)
    multiple = float(found @ direction / (direction @ direction))
    torch.testing.assert_close(found, multiple * direction, rtol=1e-4, atol=1e-6)  # nothing but the log-odds matters
    return multiple


def expected(variant: str) -> float:
    told, called = VARIANTS[variant]
    if variant == "rloo":  # compares an answer with the others only, so its gradient is the objective's own
        return float(theory.objective_gradient(LOG_ODDS, START, Q, BETA))
    return float(theory.grpo_gradient(LOG_ODDS, START, Q, told["beta"], G, **called))


def test_the_tiny_model_is_the_two_label_policy_that_is_meant(oracle):
    for trainer in (oracle(variant).trainer for variant in VARIANTS):
        for model, log_odds in ((trainer.model, LOG_ODDS), (trainer.ref_model, START)):
            with torch.no_grad():
                no, yes = model(torch.tensor([QUESTION])).logits[0, -1].tolist()
            assert yes - no == pytest.approx(log_odds, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trls_gradient_over_all_groups_is_the_closed_form(oracle, variant):
    """No sampling: every group and label that can occur goes through trl, weighted by its probability."""
    total = 0.0
    for ones, label in itertools.product(range(G + 1), (0, 1)):
        weight = binom.pmf(ones, G, expit(LOG_ODDS)) * (Q if label else 1 - Q)
        total += weight * gradient_of_log_odds(oracle(variant), [(1,) * ones + (0,) * (G - ones)], [label])
    assert total == pytest.approx(expected(variant), abs=1e-6)


@pytest.mark.parametrize("variant", ["this study", "group", "uncorrected", "rloo"])
def test_trls_gradient_over_sampled_groups_is_the_closed_form_within_its_error(oracle, variant):
    rng, found = np.random.default_rng(4), []
    for _ in range(BATCHES):
        answers = (rng.random((GROUPS, G)) < expit(LOG_ODDS)).astype(int)
        labels = (rng.random(GROUPS) < Q).astype(int)
        found.append(gradient_of_log_odds(oracle(variant), answers.tolist(), labels.tolist()))
    mean, error = np.mean(found), np.std(found, ddof=1) / math.sqrt(BATCHES)
    assert abs(mean - expected(variant)) < 4 * error
    # A wrong objective would show: the deviation's effect and the other divergence's are larger than the error.
    for other in {"this study", "group", "uncorrected", "rloo"} - {variant}:
        assert abs(mean - expected(other)) > 4 * error, other


def test_only_this_studys_settings_follow_the_gradient_of_the_objective():
    exact = float(theory.objective_gradient(LOG_ODDS, START, Q, BETA))
    assert expected("this study") == pytest.approx((G - 1) / G * exact)
    for variant in set(VARIANTS) - {"this study", "rloo"}:
        assert abs(expected(variant) / ((G - 1) / G * exact) - 1) > 0.05, variant


SEVERAL = [[first, second] for first in (0, 1) for second in (0, 1, 2)] + [[2]]  # all answers of at most two tokens
END = 2


def altered(model: Qwen3ForCausalLM, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    return model


def token_log_probabilities(model: Qwen3ForCausalLM, answer: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) log p before each token of ``answer``."""
    return model(torch.tensor([QUESTION + answer])).logits[0, len(QUESTION) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_of_several_decisions_rloo_takes_the_gradient_of_the_kl_and_grpo_that_of_each_tokens_alone(algorithm, tmp_path):
    """What GRPO leaves out is what a token does to the KL of later ones: nothing, where an answer is one decision."""
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    config = Qwen3Config(vocab_size=3, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, **shape)
    altered(Qwen3ForCausalLM(config), 0).save_pretrained(tmp_path)
    reference, model = (
        Qwen3ForCausalLM.from_pretrained(tmp_path),
        altered(Qwen3ForCausalLM.from_pretrained(tmp_path), 1),
    )
    words = Tokenizer(models.WordLevel({"no": 0, "yes": 1, "end": END}, unk_token="no"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end")

    whole, alone = torch.zeros(()), torch.zeros(())
    chance = []
    for answer in SEVERAL:
        now, before = token_log_probabilities(model, answer), token_log_probabilities(reference, answer).detach()
        said, once = (table.gather(-1, torch.tensor(answer)[:, None]).sum() for table in (now, before))
        whole = whole + said.exp() * (said - once)
        alone = alone + said.exp().detach() * (now.exp() * (now - before)).sum()
        chance.append(float(said.detach().exp()))
    assert sum(chance) == pytest.approx(1)
    torch.testing.assert_close(whole, alone)  # the same KL; only its gradients differ
    gradients = {}
    for name, value in (("whole", whole), ("alone", alone)):
        model.zero_grad()
        value.backward(retain_graph=True)
        gradients[name] = flat_gradient(model)
    assert (gradients["whole"] - gradients["alone"]).norm() > 0.05 * gradients["whole"].norm()

    told = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 2, "beta": 1.0}
    known = {"train_dataset": Dataset.from_dict({"prompt": ["no"]}), "processing_class": tokenizer}

    def nothing(completion_ids, **_):
        return [0.0] * len(completion_ids)

    rloo = algorithm == "rloo"
    if not rloo:
        told |= {"loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": True}
    trainer, handed = handed_trainer(rloo, model, nothing, tmp_path, told, **known)
    if rloo:
        groups = list(itertools.product(range(len(SEVERAL)), repeat=2))
        expected, scale = gradients["whole"], 1.0
    else:
        groups = [(number, number) for number in range(len(SEVERAL))]  # without rewards, each answer is for itself
        expected, scale = gradients["alone"], 1 / told["max_completion_length"]
    found = torch.zeros_like(expected)
    for first, second in groups:
        handed[:] = [SEVERAL[first], SEVERAL[second]]
        model.zero_grad()
        batch = trainer._generate_and_score_completions([{"prompt": "no"}] * 2)
        trainer.compute_loss(model, batch).backward()
        found += flat_gradient(model) * (chance[first] * chance[second] if rloo else chance[first])
    torch.testing.assert_close(found, scale * expected, rtol=1e-3, atol=1e-5)
