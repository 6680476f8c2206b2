"""Supervised fine-tuning (SFT) with trl's SFTTrainer: the policy imitates the annotators' answers.

The loss is the cross-entropy of the answer and its end token, mean over tokens; the question carries none. The trainer
sees token ids, not chats, so that what is taught is what is sampled and scored, token for token.
"""

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

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
    """SFTTrainer that stops on numbers that are not finite."""


def train_sft(stage: Stage) -> Outcome:
    """Supervised fine-tuning with trl's SFTTrainer; the loss covers the response and its end token only."""
    sft = stage.settings.sft
    table = training_rows(stage, sft.steps * sft.batch_size)
    rows = [
        {"input_ids": question + answer, "labels": [-100] * len(question) + answer}
        for question, answer in demonstrations(stage, table, sft.other_wording_share)
    ]
    rows_per_pass = min(sft.rows_per_pass, sft.batch_size)
    config = SFTConfig(
        **shared_arguments(stage, sft),
        per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=sft.batch_size // rows_per_pass,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    set_seed(stage_seed(stage))

    def build(callback):
        return DemonstrationTrainer(
            stage.policy,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=stage.tokenizer,
            callbacks=[callback],
        )

    samples = sft.steps * sft.batch_size
    return run_trainer(stage, build, sft.steps, samples, policy_measure(stage), "sft.rows_per_pass")
