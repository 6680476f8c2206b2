"""The learnt reward: a model that scores answers, trained on preferences by trl's RewardTrainer.

Where nobody can state the true reward as a rule, RL is paid by such a proxy.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.special import log_expit
from torch.nn.functional import logsigmoid
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from nondecoupling.task.corpus import majority_reward
from nondecoupling.task.prompts import prompt_ids, response_ids, responses
from nondecoupling.training.evaluation import OF_A_SENTENCE, Measured
from nondecoupling.training.generation import Prefix, batches, common_start, padded
from nondecoupling.training.stage import Stage, run_trainer, shared_arguments, stage_seed, training_rows
from nondecoupling.training.trainer import FiniteSteps, Outcome


class PreferenceTrainer(FiniteSteps, RewardTrainer):
    """RewardTrainer that stops on numbers that are not finite, and reads the question of a pair once."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        both = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        rows = [ids[mask].tolist() for ids, mask in both]
        pairs = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)  # trl puts the chosen first
        questions = [common_start(pair) for pair in pairs] * 2
        answers = [row[len(question) :] for row, question in zip(rows, questions, strict=True)]
        chosen, rejected = answer_scores(model, questions, answers).chunk(2)
        return -logsigmoid(chosen - rejected).mean()


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


def answer_scores(
    reward_model: Any, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> torch.Tensor:
    """(rows,) the reward model's score of one answer to each question, with gradient.

    Differences of scores are log-odds: of one answer being preferred to the other.
    """
    pad = reward_model.config.pad_token_id
    prefix = Prefix(reward_model, questions, pad, answers=False)
    return prefix.scores(padded(answers, pad, "right", prefix.mask.device)[0])


@torch.inference_mode()
def scores(reward_model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int) -> list[float]:
    """The score of each (question, answer), both token ids, an answer with its end token."""
    return [
        score
        for part in batches(pairs, batch_size)
        for score in answer_scores(reward_model, *zip(*part, strict=True)).tolist()
    ]


def label_scores(reward_model: Any, stage: Stage, table: pd.DataFrame) -> np.ndarray:
    """(sentences, 2) scores that a reward model gives the two answers to each sentence, indexed by label."""
    answers = [response_ids(stage.tokenizer, text) for text in responses(stage.settings.prompt)]
    questions = prompt_ids(stage.tokenizer, stage.settings.prompt, table["sentence"])
    pairs = [(question, answer) for question in questions for answer in answers]
    return np.reshape(scores(reward_model, pairs, stage.settings.evaluation.batch_size), (-1, 2))


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
