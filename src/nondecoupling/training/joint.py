"""SFT and RL in one stage: updates follow (1 - weight) x (RL objective) - weight x (SFT loss), or they take turns.

The RL part is `rl`'s; imitation is added to each of its steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import set_seed

from nondecoupling.study.profile import Joint
from nondecoupling.training.generation import answer_log_probabilities, batches, padded
from nondecoupling.training.rl import (
    DistinctGRPOTrainer,
    grpo_config,
    grpo_options,
    measure_paid,
    reward_functions,
    rl_questions,
)
from nondecoupling.training.stage import Stage, demonstrations, run_trainer, stage_seed, training_rows
from nondecoupling.training.trainer import Outcome


class JointTrainer(DistinctGRPOTrainer):
    """GRPOTrainer whose updates also imitate: gradient of weight x (SFT loss) - (1 - weight) x (RL objective).

    ``examples`` are (question, answer) token ids, of which each update reads the next ``examples_per_step``;
    ``weight_at`` gives the weight of step 0, 1, ...; ``rl_scale`` turns trl's loss into the negative RL objective.
    """

    def __init__(
        self,
        *args: Any,
        examples: list[tuple[list[int], list[int]]],
        examples_per_step: int,
        weight_at: Callable[[int], float],
        rl_scale: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples, self.examples_per_step = examples, examples_per_step
        self.weight_at, self.rl_scale = weight_at, rl_scale

    def training_step(self, model, inputs, *args, **kwargs):
        weight, loss = self.weight_at(self.state.global_step), torch.zeros((), device=self.accelerator.device)
        if weight < 1:
            self.scale = (1 - weight) * self.rl_scale
            loss = loss + super().training_step(model, inputs, *args, **kwargs)
        if weight > 0:
            loss = loss + weight * self.imitate(model, weight)
        return loss

    def imitate(self, model, weight: float) -> torch.Tensor:
        """Add the gradient of ``weight`` x (SFT loss on the next examples); returns that loss, nats per response."""
        model.train()
        tokenizer: Any = self.processing_class
        first, pad = self.state.global_step * self.examples_per_step, tokenizer.pad_token_id
        total = torch.zeros((), device=self.accelerator.device)
        chosen = [self.examples[(first + i) % len(self.examples)] for i in range(self.examples_per_step)]
        self.batch = tokenizer.decode(chosen[0][0])
        for part in batches(chosen, self.rows_per_pass):
            questions, given = zip(*part, strict=True)
            answers, counted = padded(given, pad, "right", self.accelerator.device)
            logp = answer_log_probabilities(model, questions, answers, pad)
            loss = -(logp * counted).sum() / len(chosen)
            self.accelerator.backward(weight * loss)
            total = total + loss.detach()
        self._metrics["train"]["sft_loss"].append(float(total))
        return total


def weight_at(joint: Joint, step: int) -> float:
    """Weight of the SFT loss in update ``step`` (from 0): ``joint.weight``, or 1 and 0 by turns with phases."""
    if not joint.phases:
        return joint.weight
    return 1.0 if step * 2 * joint.phases // joint.steps % 2 == 0 else 0.0


def train_joint(stage: Stage) -> Outcome:
    """SFT and RL in one stage, on (1 - weight) x (RL objective) - weight x (SFT loss), or in phases that alternate."""
    joint, rl = stage.settings.joint, stage.settings.rl
    group = rl.answers_per_prompt
    demonstrated = training_rows(stage, joint.steps * joint.demonstrations_per_step)
    questions = rl_questions(stage, joint.steps * joint.prompts_per_step, draw=1)
    set_seed(stage_seed(stage))

    def build(callback):
        return JointTrainer(
            stage.policy,
            reward_functions(stage),
            grpo_config(stage, joint),
            train_dataset=questions,
            callbacks=[callback],
            **grpo_options(stage),
            examples=demonstrations(stage, demonstrated),
            examples_per_step=joint.demonstrations_per_step,
            weight_at=lambda step: weight_at(joint, step),
            # dr_grpo divides by the longest answer's length; its policy gradient is (G - 1) / G of the true one
            rl_scale=stage.settings.prompt.max_new_tokens * group / (group - 1),
        )

    answers = joint.steps * (joint.prompts_per_step * group + joint.demonstrations_per_step)
    refers = rl.beta > 0 and weight_at(joint, 0) < 1
    return run_trainer(stage, build, joint.steps, answers, measure_paid(stage), "rl.rows_per_pass", refers=refers)
