"""Supervised fine-tuning (SFT) with trl's SFTTrainer: the policy imitates the annotators' answers.

The loss is the cross-entropy of the answer and its end token, mean over tokens; the question carries none. The trainer
sees token ids, not chats, so that what is taught is what is sampled and scored, token for token.
"""

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from nondecoupling.training.generation import answer_log_probabilities, padded
from nondecoupling.training.stage import (
    Stage,
    demonstrations,
    policy_measure,
    run_trainer,
    shared_arguments,
    stage_seed,
    training_rows,
)
from nondecoupling.training.trainer import FiniteSteps, Outcome


class DemonstrationTrainer(FiniteSteps, SFTTrainer):
    """SFTTrainer that stops on numbers that are not finite, and reads what all questions begin with once."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        taught, pad = inputs["labels"] != -100, self.processing_class.pad_token_id
        asked = inputs["attention_mask"].bool() & ~taught
        rows = list(zip(inputs["input_ids"], asked, taught, strict=True))
        questions = [ids[question].tolist() for ids, question, _ in rows]
        answers, counted = padded([ids[answer].tolist() for ids, _, answer in rows], pad, "right", taught.device)
        total = -(answer_log_probabilities(model, questions, answers, pad) * counted).sum()
        return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def sft_rows(taught: list[tuple[list[int], list[int]]]) -> Dataset:
    """Questions and answers as trl's SFTTrainer reads them, with no loss on the question."""
    return Dataset.from_list(
        [{"input_ids": question + answer, "labels": [-100] * len(question) + answer} for question, answer in taught]
    )


def sft_config(stage: Stage) -> SFTConfig:
    """SFT's arguments: at most ``rows_per_pass`` sentences at a time, as many passes as fill the batch."""
    sft = stage.settings.sft
    rows_per_pass = min(sft.rows_per_pass, sft.batch_size)
    return SFTConfig(
        **shared_arguments(stage, sft),
        per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=sft.batch_size // rows_per_pass,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )


def train_sft(stage: Stage) -> Outcome:
    """Supervised fine-tuning with trl's SFTTrainer; the loss covers the response and its end token only."""
    sft = stage.settings.sft
    table = training_rows(stage, sft.steps * sft.batch_size)
    rows, config = sft_rows(demonstrations(stage, table, sft.other_wording_share)), sft_config(stage)
    set_seed(stage_seed(stage))

    def build(callback):
        return DemonstrationTrainer(
            stage.policy,
            config,
            train_dataset=rows,
            processing_class=stage.tokenizer,
            callbacks=[callback],
        )

    samples = sft.steps * sft.batch_size
    return run_trainer(stage, build, sft.steps, samples, policy_measure(stage), "sft.rows_per_pass")
