"""The learnt reward: a model that scores answers, trained on preferences by trl's RewardTrainer.

Where nobody can state the true reward as a rule, RL is paid by such a proxy.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from scipy.special import log_expit
from transformers import PreTrainedModel, set_seed
from trl import RewardConfig, RewardTrainer

from nondecoupling.task.corpus import majority_reward
from nondecoupling.task.prompts import prompt_ids, response_ids, responses
from nondecoupling.training.evaluation import OF_A_SENTENCE, Measured
from nondecoupling.training.generation import batches, padded
from nondecoupling.training.stage import Stage, run_trainer, shared_arguments, stage_seed, training_rows
from nondecoupling.training.trainer import FiniteSteps, Outcome


class PreferenceTrainer(FiniteSteps, RewardTrainer):
    """RewardTrainer that stops on numbers that are not finite."""


def train_reward_model(stage: Stage) -> Outcome:
    """A reward model by trl's RewardTrainer: -log sigmoid(score of the right answer - score of the wrong one).

    Its optimum is the log-odds of the label (Bradley and Terry): where annotators disagree it says by how much.
    """
    settings, prompt, tokenizer = stage.settings.reward_model, stage.settings.prompt, stage.tokenizer
    answers = [response_ids(tokenizer, text) for text in responses(prompt)]
    table = training_rows(stage, settings.steps * settings.pairs_per_step)
    pairs = [
        {"chosen_ids": question + answers[label], "rejected_ids": question + answers[1 - label]}
        for question, label in zip(prompt_ids(tokenizer, prompt, table["sentence"]), table["label"], strict=True)
    ]
    config = RewardConfig(
        **shared_arguments(stage, settings),
        per_device_train_batch_size=settings.pairs_per_step,
        max_length=None,
        disable_dropout=True,
    )
    set_seed(stage_seed(stage))

    def build(callback):
        return PreferenceTrainer(
            stage.policy,
            config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[callback],
        )

    samples = settings.steps * settings.pairs_per_step
    return run_trainer(
        stage,
        build,
        settings.steps,
        samples,
        lambda tables: measure_reward_model(stage, tables),
        "reward_model.pairs_per_step",
    )


@torch.inference_mode()
def scores(reward_model: PreTrainedModel | PeftModel, rows: list[list[int]], batch_size: int) -> list[float]:
    """The reward model's score of each row of token ids (question, answer, end token).

    Differences of scores are log-odds: of one answer being preferred to the other.
    """
    device, pad, found = next(reward_model.parameters()).device, reward_model.config.pad_token_id, []
    for part in batches(rows, batch_size):
        ids, mask = padded(part, pad, "right", device)
        found += reward_model(ids, attention_mask=mask, use_cache=False).logits[:, 0].tolist()
    return found


def label_scores(reward_model: Any, stage: Stage, table: pd.DataFrame) -> np.ndarray:
    """(sentences, 2) scores that a reward model gives the two answers to each sentence, indexed by label."""
    answers = [response_ids(stage.tokenizer, text) for text in responses(stage.settings.prompt)]
    questions = prompt_ids(stage.tokenizer, stage.settings.prompt, table["sentence"])
    rows = [question + answer for question in questions for answer in answers]
    return np.reshape(scores(reward_model, rows, stage.settings.evaluation.batch_size), (-1, 2))


def measure_reward_model(stage: Stage, tables: dict[str, pd.DataFrame]) -> Measured:
    """How often and by how much the reward model prefers the right answer, and its scores, on each of ``tables``.

    ``pair_loss`` is in nats. A model that only knows the majority label has ``accuracy`` = (1 + majority_reward) / 2.
    """
    metrics, predictions, training = {}, {}, stage.policy.training
    stage.policy.eval()
    for split, table in tables.items():
        scored = label_scores(stage.policy, stage, table)
        labels = table["label"].to_numpy()
        margin = (2 * labels - 1) * (scored[:, 1] - scored[:, 0])
        metrics[split] = {
            "n": len(table),
            "majority_reward": majority_reward(table["label"]),
            "accuracy": float((margin > 0).mean()),
            "margin": float(margin.mean()),
            "pair_loss": float(-log_expit(margin).mean()),
        }
        predictions[split] = table[OF_A_SENTENCE].assign(score_acceptable=scored[:, 1], score_unacceptable=scored[:, 0])
    stage.policy.train(training)
    return metrics, predictions
