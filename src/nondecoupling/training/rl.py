"""Reinforcement learning (RL) of E[r] - beta KL(p | p_start) with trl's GRPOTrainer or RLOOTrainer.

How this differs from trl's defaults, and why:

* The gradient is that of the theory's objective: loss "dr_grpo", advantages not divided by the group's deviation
  (``rl.normalisation: none``; ``group`` restores trl's defaults), beta scaled for the group's mean (`Rl.grpo_beta`).
  Exactly so for answers of one decision. GRPO's KL term is a sum over tokens and leaves out what a token does to the KL
  of later ones, where these depend on it; RLOO, which has the KL of the whole answer in its reward, does not.
* The KL reference is the policy that the stage starts from; the KL of the first step is checked to be 0.
* Every step samples fresh answers from the current policy (one gradient step per generation, no stale samples).
  RLOO, the other algorithm, compares an answer with the mean of the *other* answers: its beta needs no scale.
* Prompts are read once for all their answers, and equal (prompt, answer) pairs are scored once: the same numbers, less
  work. Where a step has more distinct pairs than ``rl.rows_per_pass``, they are differentiated in several passes.

How the trainers build on trl's, and what they take from its inside::

    trl.GRPOTrainer                        trl.RLOOTrainer
        |                                      |
        +-- FiniteSteps: training_step, log: stop at the first number that is not finite
        +-- DistinctAnswers: compute_loss in passes, times `scale`
        |                                      |
    DistinctGRPOTrainer                    DistinctRLOOTrainer
        |   sampling: trl's rollout_func       sampling: _generate_single_turn
    joint.JointTrainer: training_step adds the SFT loss, and sets `scale`

Private methods of trl that are overridden, and checked to be there when a trainer is built (``private``):
``_get_per_token_logps_and_entropies``, to score equal rows once and read equal prompts once, and
``_generate_single_turn``, because RLOO has no rollout_func. JointTrainer logs through ``_metrics``. Each raises
AttributeError where trl has lost it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import softmax
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from nondecoupling.study.profile import Joint, Rl
from nondecoupling.study.results import label_log_probabilities
from nondecoupling.task.prompts import (
    TEMPLATE_OPTIONS,
    answer_texts,
    chat_ids,
    parse_other_wording,
    parse_robust,
    parse_strict,
    prompt_messages,
    reward,
)
from nondecoupling.task.seeds import seed_of
from nondecoupling.training.generation import Prefix, answer_logits, batches
from nondecoupling.training.reward_model import label_scores, scores
from nondecoupling.training.stage import Stage, policy_measure, run_trainer, shared_arguments, stage_seed, training_rows
from nondecoupling.training.trainer import FiniteSteps, Measure, Outcome


class DistinctAnswers(FiniteSteps):
    """What the RL trainers add to trl's: the model runs once per distinct (prompt, answer), as most are equal.

    At most ``rows_per_pass`` of them are differentiated at a time, which bounds memory whatever is sampled. The loss is
    multiplied by ``scale``. Batches (``inputs``) are trl's dictionaries: ``prompt_ids`` (answers, p),
    ``completion_ids`` (answers, c) and what belongs to them, answer by answer.
    """

    scale = 1.0
    private: tuple[str, ...] = ("_get_per_token_logps_and_entropies",)  # methods of trl that are overridden

    def __init__(self, *args: Any, rows_per_pass: int, **kwargs: Any) -> None:
        for name in self.private:
            if not hasattr(super(), name):
                raise AttributeError(f"trl's trainers have no {name} any more: see the text of training/rl.py.")
        super().__init__(*args, **kwargs)
        self.rows_per_pass = rows_per_pass

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        both = torch.stack([input_ids, attention_mask], -1)
        distinct, origin = torch.unique(both, dim=0, return_inverse=True)
        logps, entropies = [], []
        for part in distinct.split(self.rows_per_pass):
            (ids, seen), answers = part[:, :-logits_to_keep].unbind(-1), part[:, -logits_to_keep:, 0]
            questions = [row[shown].tolist() for row, shown in zip(ids, seen.bool(), strict=True)]
            logits = answer_logits(model, questions, answers, self.processing_class.pad_token_id)
            logp = logits.log_softmax(-1)
            logps.append(logp.gather(-1, answers[..., None])[..., 0])
            entropies.append(-(logp.detach().exp() * logp.detach()).sum(-1))
        return torch.cat(logps)[origin], torch.cat(entropies)[origin] if compute_entropy else None, None

    def passes(self, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
        """``inputs`` in parts of at most ``rows_per_pass`` distinct rows, each with its loss's weight in the whole."""
        rows = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        _, origin = torch.unique(rows, dim=0, return_inverse=True)
        if int(origin.max()) < self.rows_per_pass:
            return [(inputs, 1.0)]
        # dapo divides by num_items_in_batch, which stays that of the whole; the others by the rows they are given
        trainer: Any = self
        whole = getattr(trainer.args, "loss_type", None) == "dapo"
        parts = []
        for number in range(int(origin.max()) // self.rows_per_pass + 1):
            chosen = origin // self.rows_per_pass == number
            part = {k: v[chosen] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in inputs.items()}
            parts.append((part, 1.0 if whole else float(chosen.float().mean())))
        return parts

    def compute_loss(self, model, inputs, *args, **kwargs):
        *before, last = self.passes(inputs)
        done = 0.0
        for part, weight in before:
            loss = self.scale * weight * super().compute_loss(model, part, *args, **kwargs)
            self.accelerator.backward(loss)  # frees this pass's memory; the gradients add up
            done = done + loss.detach()
        return done + self.scale * last[1] * super().compute_loss(model, last[0], *args, **kwargs)


class DistinctGRPOTrainer(DistinctAnswers, GRPOTrainer):
    """GRPOTrainer with what `DistinctAnswers` adds."""


class DistinctRLOOTrainer(DistinctAnswers, RLOOTrainer):
    """RLOOTrainer with what `DistinctAnswers` adds; ``sample`` draws one answer to each row of question ids."""

    private = (*DistinctAnswers.private, "_generate_single_turn")

    def __init__(self, *args: Any, sample: Callable[[list[list[int]]], list[list[int]]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sample = sample

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return self.sample(prompt_ids)


def sample_answers(stage: Stage, questions: list[list[int]]) -> list[list[int]]:
    """One answer of the stage's policy to each row of question ids; equal questions are neighbours, a group each."""
    rl, tokenizer, group = stage.settings.rl, stage.tokenizer, stage.settings.rl.answers_per_prompt
    answers = []
    with torch.no_grad():
        for part in batches(questions[::group], rl.rows_per_pass):
            prefix = Prefix(stage.policy, [question for question in part for _ in range(group)], tokenizer.pad_token_id)
            answers += prefix.answers(tokenizer.eos_token_id, stage.settings.prompt.max_new_tokens)
    return answers


def reward_functions(stage: Stage) -> list[Callable[..., list[float]]]:
    """What pays an answer according to ``rl.reward``, then what pays nothing and is there for the log, means by step.

    ``gold`` is the true reward with the robust reading, where another one pays; ``off_format`` is 1 for an answer in
    which the reading that pays finds no label.
    """
    prompt, tokenizer, paid = stage.settings.prompt, stage.tokenizer, stage.settings.rl.reward
    paid_reading = {"strict": parse_strict, "other_wording": parse_other_wording}.get(paid, parse_robust)

    def label_reward(completion_ids, label, parse=paid_reading, **_):
        answers = answer_texts(tokenizer, completion_ids)
        return [reward(truth, parse(prompt, answer)) for truth, answer in zip(label, answers, strict=True)]

    def gold(completion_ids, label, **_):
        return label_reward(completion_ids, label, parse_robust)

    def off_format(completion_ids, **_):
        return [float(paid_reading(prompt, answer) is None) for answer in answer_texts(tokenizer, completion_ids)]

    def drawn(completion_ids, drawn_label, **_):
        return label_reward(completion_ids, drawn_label)

    def proxy(prompts, completion_ids, **_):
        rows = [(tuple(q), tuple(a)) for q, a in zip(chat_ids(tokenizer, prompts), completion_ids, strict=True)]
        distinct = list(dict.fromkeys(rows))  # most answers of a group are equal
        found = scores(stage.proxy, distinct, stage.settings.evaluation.batch_size)
        by_row = dict(zip(distinct, found, strict=True))
        return [by_row[row] for row in rows]

    special: dict[str, list[Callable[..., list[float]]]] = {
        "other_wording": [label_reward, gold],
        "random": [drawn, gold],
        "proxy": [proxy, gold],
    }
    return [*special.get(paid, [label_reward]), off_format]


def rl_arguments(stage: Stage, settings: Rl | Joint) -> dict[str, Any]:
    """Trainer arguments that all RL shares; beta is not among them."""
    group, paying = stage.settings.rl.answers_per_prompt, reward_functions(stage)
    return shared_arguments(stage, settings) | {
        "per_device_train_batch_size": settings.prompts_per_step * group,
        "num_generations": group,
        "steps_per_generation": 1,
        "max_completion_length": stage.settings.prompt.max_new_tokens,
        "temperature": 1.0,
        "reward_weights": [1.0, *[0.0] * (len(paying) - 1)],
        "chat_template_kwargs": TEMPLATE_OPTIONS,
    }


def rl_questions(stage: Stage, count: int, draw: int = 0) -> Dataset:
    """``count`` questions as trl's RL trainers read them, with the right labels and those that a coin drew for each."""
    table = training_rows(stage, count, draw)
    coin, prompt = np.random.default_rng(seed_of(f"{stage.run.name} coin", stage.seed)), stage.settings.prompt
    drawn = coin.integers(len(prompt.answers), size=len(table))
    chats = [prompt_messages(prompt, sentence) for sentence in table["sentence"]]
    return Dataset.from_dict({"prompt": chats, "label": table["label"].tolist(), "drawn_label": drawn.tolist()})


def grpo_config(stage: Stage, settings: Rl | Joint) -> GRPOConfig:
    """GRPO's arguments; see the module's text for what differs from the defaults, and why."""
    rl = stage.settings.rl
    exact = rl.normalisation == "none"
    return GRPOConfig(
        **rl_arguments(stage, settings),
        loss_type="dr_grpo" if exact else "dapo",
        scale_rewards="none" if exact else "group",
        beta=rl.grpo_beta,
        use_bias_correction_kl=True,  # else the KL term has the gradient of KL(reference | policy)
    )


def grpo_options(stage: Stage) -> dict[str, Any]:
    """What GRPO's trainers get besides model, rewards, arguments, questions and callbacks."""
    group = stage.settings.rl.answers_per_prompt

    def sample_groups(chats: list, trainer: GRPOTrainer) -> dict[str, Any]:
        asked = [question for question in chat_ids(stage.tokenizer, chats[::group]) for _ in range(group)]
        return {"prompt_ids": asked, "completion_ids": sample_answers(stage, asked), "logprobs": None}

    return {
        "processing_class": stage.tokenizer,
        "rollout_func": sample_groups,
        "rows_per_pass": stage.settings.rl.rows_per_pass,
    }


def train_rl(stage: Stage) -> Outcome:
    """Reinforcement learning with trl's GRPOTrainer or RLOOTrainer; see the module's text for what differs from trl."""
    rl = stage.settings.rl
    questions = rl_questions(stage, rl.steps * rl.prompts_per_step)
    set_seed(stage_seed(stage))

    def build(callback):
        known = {"train_dataset": questions, "callbacks": [callback]}
        if rl.algorithm == "grpo":
            config = grpo_config(stage, rl)
            return DistinctGRPOTrainer(stage.policy, reward_functions(stage), config, **known, **grpo_options(stage))
        return DistinctRLOOTrainer(
            stage.policy,
            reward_functions(stage),
            RLOOConfig(**rl_arguments(stage, rl), beta=rl.beta),
            processing_class=stage.tokenizer,
            rows_per_pass=rl.rows_per_pass,
            sample=lambda asked: sample_answers(stage, asked),
            **known,
        )

    answers = rl.steps * rl.prompts_per_step * rl.answers_per_prompt
    return run_trainer(
        stage,
        build,
        rl.steps,
        answers,
        measure_paid(stage),
        "rl.rows_per_pass",
        check_start=lambda start: check_rewarded(rl, start),
        refers=rl.beta > 0,
    )


def measure_paid(stage: Stage) -> Measure:
    """How a stage that learns from rewards measures its policy.

    Where a reward model pays, ``reward_proxy`` is its mean score of the policy's answers, from the two labels'
    probabilities. Neither it nor the sentences change during a stage, so that it scores them once.
    """
    plain = policy_measure(stage)
    if stage.proxy is None:
        return plain
    known: dict[tuple, Any] = {}

    def measure(tables):
        metrics, answers = plain(tables)
        for split, table in tables.items():
            key = split, *table.index
            if key not in known:
                known[key] = label_scores(stage.proxy, stage, table)
            likely = softmax(label_log_probabilities(answers[split]), axis=1)
            metrics[split]["reward_proxy"] = float((likely * known[key]).sum(1).mean())
        return metrics, answers

    return measure


def check_rewarded(rl: Rl, start: dict[str, float]) -> None:
    """Raise RuntimeError where the policy that RL starts from, with metrics ``start``, earns too rarely to learn.

    Judges the two true rewards; the others are there to see what they do.
    """
    if rl.reward not in ("strict", "robust"):
        return
    earned = start["reward_sampled_strict" if rl.reward == "strict" else "reward_sampled"]
    share = (1 + earned) / 2
    print(f"before the first step {share:.1%} of the sampled answers earn +1 (rl.reward={rl.reward})")
    if share < rl.least_rewarded:
        raise RuntimeError(
            f"RL cannot start: {share:.1%} of the sampled answers earn +1 under rl.reward={rl.reward}, fewer than "
            f"rl.least_rewarded={rl.least_rewarded:.1%}, so nearly all answers of a group earn -1 and nothing can be "
            f"learnt; change prompt.template, set rl.reward=robust, or rl.least_rewarded=0 to run it all the same."
        )
