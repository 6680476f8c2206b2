"""The two stages, through trl: supervised fine-tuning (SFT) and reinforcement learning (GRPO).

How this RL differs from trl's defaults, and why:

* The gradient is that of E[r] - beta KL(p | p_start), the objective of the theory: loss "dr_grpo", advantages not
  divided by the group's deviation (``rl.normalisation: none``; ``group`` restores trl's defaults).
* A group's mean reward contains the answer it is subtracted from, which shrinks the policy gradient by (G - 1) / G
  for G answers per prompt. beta is scaled by the same factor, so that the fixed point is the closed form's.
* The KL reference is the policy that the stage starts from; the KL of the first step is checked to be 0.
* Every step samples fresh answers from the current policy (one gradient step per generation, no stale samples).
* Prompts are read once for all their answers, and equal (prompt, answer) pairs are scored once: the same numbers, less
  work.
"""

import math
import resource
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from nondecoupling import corpus as corpora
from nondecoupling import models, runs
from nondecoupling.evaluation import Prefix, predict, summarise
from nondecoupling.profile import Profile, Study
from nondecoupling.prompts import (
    TEMPLATE_OPTIONS,
    answer_texts,
    chat_ids,
    check_prefix,
    parse_robust,
    parse_strict,
    prompt_ids,
    prompt_messages,
    response_ids,
    responses,
    reward,
)


class Stage(NamedTuple):
    """All that a stage needs, loaded and checked."""

    study: Study
    run: str
    parent: str
    seed: int
    settings: Profile
    root: Path
    base: Path
    corpus: pd.DataFrame
    tokenizer: Any
    policy: Any
    references: dict[str, Path]
    started: datetime


class Outcome(NamedTuple):
    """What a stage produced."""

    trajectory: pd.DataFrame
    log: pd.DataFrame
    training: dict[str, Any]


def data_folder(study: Study, root: Path) -> Path:
    """Where the study's TSV files are: the user's folder, or the generated ones of the data run."""
    return Path(study.profile.data.folder) if study.profile.data.folder else root / "data"


def load_checked_corpus(study: Study, root: Path) -> pd.DataFrame:
    """The study's corpus; ValueError if its files are not those that the data run described."""
    described = runs.read_json(runs.require_complete(root / "data", "Loading the corpus") / runs.METRICS)
    folder = data_folder(study, root)
    for name, expected in described["provenance"]["data_sha256"].items():
        found = runs.file_hashes(folder, name).get(name)
        if found != expected:
            raise ValueError(f"{folder / name} has sha256 {found}, but 01_data saw {expected}; run 01_data again.")
    return corpora.load_corpus(folder)


def base_folder(study: Study, root: Path) -> Path:
    """Where the base model's files are."""
    return Path(study.profile.model.folder) if study.profile.model.folder else root / "base" / runs.POLICY


def describe_model(study: Study, base: Path) -> dict[str, Any]:
    """Which base model this is: its folder's name and the sha256 of its weights."""
    name = Path(study.profile.model.folder).name if study.profile.model.folder else "pretrained by 02_base"
    return {"id": name, "sha256": runs.file_hashes(base, "*.safetensors")}


def prepare_stage(study: Study, run: str, seed: int, expected: str) -> Stage:
    """Load corpus, tokenizer and the parent's policy for one run of the plan.

    Raises ValueError if the run is not of the ``expected`` stage, FileNotFoundError if its parent has not been run.
    """
    started = runs.now()
    plan, settings, root = study.run(run), study.for_run(run), runs.study_folder(study)
    if plan.stage != expected:
        raise ValueError(f"Run '{run}' is a stage '{plan.stage}', not '{expected}'; use the notebook of that stage.")
    folders = {"parent": runs.run_folder(root, plan.parent, seed), "base": root / "base"}
    for folder in folders.values():
        runs.require_complete(folder, f"Run '{run}'")
    corpus, base = load_checked_corpus(study, root), base_folder(study, root)
    tokenizer = models.load_tokenizer(base)
    check_prefix(tokenizer, settings.prompt, corpus["sentence"].iloc[0])
    parent_policy = None if plan.parent == "base" else folders["parent"] / runs.POLICY
    policy = models.start_policy(base, parent_policy, settings.adaptation, seed)
    return Stage(study, run, plan.parent, seed, settings, root, base, corpus, tokenizer, policy, folders, started)


def evaluation_tables(corpus: pd.DataFrame, train_size: int) -> dict[str, pd.DataFrame]:
    """The sentences on which policies are measured: each dev split whole, and a fixed part of train."""
    tables = {split: table.reset_index(drop=True) for split, table in corpus.groupby("split") if split != "train"}
    return {**tables, "train": corpora.training_subset(corpus, train_size)}


def measure(
    model: Any, tokenizer: Any, settings: Profile, tables: dict[str, pd.DataFrame], references: dict[str, Path]
) -> tuple[dict[str, dict[str, float]], dict[str, pd.DataFrame]]:
    """Metrics and predictions of a policy on each of ``tables``; ``references`` are finished runs to take KL from."""
    unacceptable, acceptable = (len(response_ids(tokenizer, text)) for text in responses(settings.prompt))
    metrics, predictions = {}, {}
    for split, table in tables.items():
        predictions[split] = predict(model, tokenizer, settings.prompt, table, settings.evaluation)
        known = {name: runs.read_predictions(folder, split) for name, folder in references.items()}
        metrics[split] = summarise(predictions[split], settings.prompt, (unacceptable, acceptable), known)
    return metrics, predictions


def evaluation_steps(steps: int, points: int) -> list[int]:
    """``points`` steps from 0 to ``steps``, evenly spread."""
    return sorted({round(step) for step in np.linspace(0, steps, points)})


class StageCallback(TrainerCallback):
    """Measures the policy at given steps, stops on numbers that are not finite, and prints progress."""

    def __init__(self, at: list[int], measure_policy: Callable[[], dict[str, float]], check_reference: bool) -> None:
        self.at, self.measure_policy, self.check_reference = at, measure_policy, check_reference
        self.rows: list[dict[str, float]] = []
        self.log: list[dict[str, float]] = []
        self.started, self.measuring = time.perf_counter(), 0.0

    def measure_if_due(self, step: int) -> None:
        if step in self.at:
            start = time.perf_counter()
            self.rows.append({"step": step, **self.measure_policy()})
            self.measuring += time.perf_counter() - start

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.measure_if_due(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.measure_if_due(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(
                    f"{name} is {logs[name]} at step {state.global_step}: training diverged; lower the learning rate."
                )
        if self.check_reference and state.global_step == 1 and not abs(logs["kl"]) < 1e-5:
            raise RuntimeError(f"KL to the reference is {logs['kl']:.2g} before the first update; it must be 0.")
        self.log.append({"step": state.global_step, **{k: v for k, v in logs.items() if isinstance(v, int | float)}})
        if state.global_step % max(1, state.max_steps // 5) == 0:
            elapsed = time.perf_counter() - self.started
            left = elapsed / state.global_step * (state.max_steps - state.global_step)
            earned = f"  reward {logs['reward']:+.3f}" if "reward" in logs else ""
            print(f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}{earned}  {left:.0f} s left")


def shared_arguments(steps: int, learning_rate: float, warmup_share: float, schedule: str, seed: int) -> dict[str, Any]:
    """Trainer arguments that both stages share; those that differ from the defaults say why."""
    return {
        "output_dir": tempfile.gettempdir(),  # must exist; the trainer saves nothing
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,  # every step is checked for finite numbers
        "logging_nan_inf_filter": False,  # the default hides them
        "max_steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_share,  # a float is a share of all steps
        "lr_scheduler_type": schedule,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,  # trl's default is True, also on a CPU
        "gradient_checkpointing": False,  # trl's default is True; sequences here are short
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
    }


def stage_seed(stage: Stage) -> int:
    """Seed of a stage's data order and sampling, from the names alone: other runs in the plan change nothing."""
    return zlib.crc32(f"{stage.run} {stage.seed}".encode())


def training_rows(stage: Stage, count: int) -> pd.DataFrame:
    """``count`` training sentences in an order drawn by the stage's seed (all of them where there are fewer)."""
    train = stage.corpus[stage.corpus["split"] == "train"]
    return train.sample(min(count, len(train)), random_state=stage_seed(stage)).reset_index(drop=True)


def train_sft(stage: Stage) -> Outcome:
    """Supervised fine-tuning with trl's SFTTrainer; the loss covers the response and its end token only."""
    sft, prompt, tokenizer = stage.settings.sft, stage.settings.prompt, stage.tokenizer
    answers = [response_ids(tokenizer, text) for text in responses(prompt)]
    table = training_rows(stage, sft.steps * sft.batch_size)
    rows = [
        {"input_ids": question + answers[label], "labels": [-100] * len(question) + answers[label]}
        for question, label in zip(prompt_ids(tokenizer, prompt, table["sentence"]), table["label"], strict=True)
    ]
    config = SFTConfig(
        **shared_arguments(sft.steps, sft.learning_rate, sft.warmup_share, sft.schedule, stage_seed(stage)),
        per_device_train_batch_size=sft.batch_size,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    set_seed(stage_seed(stage))

    def build(callback):
        return SFTTrainer(
            stage.policy,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[callback],
        )

    return run_trainer(stage, build, sft.steps, sft.steps * sft.batch_size, check_reference=False)


class DistinctGRPOTrainer(GRPOTrainer):
    """GRPOTrainer that runs the model once per distinct (prompt, answer): most answers of a group are equal."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        both = torch.stack([input_ids, attention_mask], -1)
        distinct, origin = torch.unique(both, dim=0, return_inverse=True)
        logps, entropies, auxiliary = super()._get_per_token_logps_and_entropies(
            model, distinct[..., 0], distinct[..., 1], *args, **kwargs
        )
        return logps[origin], None if entropies is None else entropies[origin], auxiliary


def train_rl(stage: Stage) -> Outcome:
    """Reinforcement learning with trl's GRPOTrainer; see the module's text for what differs from its defaults."""
    rl, prompt, tokenizer = stage.settings.rl, stage.settings.prompt, stage.tokenizer
    parse = parse_strict if rl.reward == "strict" else parse_robust
    group = rl.answers_per_prompt

    def label_reward(completion_ids: list[list[int]], label: list[int], **_: Any) -> list[float]:
        answers = answer_texts(tokenizer, completion_ids)
        return [reward(gold, parse(prompt, answer)) for gold, answer in zip(label, answers, strict=True)]

    @torch.no_grad()
    def sample_groups(chats: list, trainer: GRPOTrainer) -> dict[str, Any]:
        questions = chat_ids(tokenizer, chats[::group])
        prefix = Prefix(stage.policy, questions, tokenizer.pad_token_id, copies=group)
        answers = prefix.answers(tokenizer.eos_token_id, prompt.max_new_tokens)
        return {"prompt_ids": [q for q in questions for _ in range(group)], "completion_ids": answers, "logprobs": None}

    exact = rl.normalisation == "none"
    config = GRPOConfig(
        **shared_arguments(rl.steps, rl.learning_rate, rl.warmup_share, rl.schedule, stage_seed(stage)),
        per_device_train_batch_size=rl.prompts_per_step * group,
        num_generations=group,
        steps_per_generation=1,
        max_completion_length=prompt.max_new_tokens,
        temperature=1.0,
        loss_type="dr_grpo" if exact else "dapo",
        scale_rewards="none" if exact else "group",
        beta=rl.beta * (group - 1) / group if exact else rl.beta,
        use_bias_correction_kl=True,  # else the KL term has the gradient of KL(reference | policy)
        chat_template_kwargs=TEMPLATE_OPTIONS,
    )
    table = training_rows(stage, rl.steps * rl.prompts_per_step)
    chats = [prompt_messages(prompt, sentence) for sentence in table["sentence"]]
    dataset = Dataset.from_dict({"prompt": chats, "label": table["label"].tolist()})
    set_seed(stage_seed(stage))

    def build(callback):
        return DistinctGRPOTrainer(
            stage.policy,
            label_reward,
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[callback],
            rollout_func=sample_groups,
        )

    return run_trainer(stage, build, rl.steps, rl.steps * rl.prompts_per_step * group, check_reference=rl.beta > 0)


def run_trainer(
    stage: Stage, build: Callable[[TrainerCallback], Any], steps: int, samples: int, check_reference: bool
) -> Outcome:
    """Train with the trainer that ``build`` returns, measuring dev along the way."""
    dev = evaluation_tables(stage.corpus, stage.settings.evaluation.train_size)["dev"]

    def measure_policy() -> dict[str, float]:
        metrics, _ = measure(stage.policy, stage.tokenizer, stage.settings, {"dev": dev}, stage.references)
        return metrics["dev"]

    callback = StageCallback(evaluation_steps(steps, stage.settings.evaluation.points), measure_policy, check_reference)
    trainer = build(callback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.perf_counter() - callback.started
    trained, total = models.count_parameters(stage.policy)
    training = {
        "steps": steps,
        "wall_seconds": round(seconds, 2),
        "evaluation_seconds": round(callback.measuring, 2),
        "samples_per_second": round(samples / (seconds - callback.measuring), 1),
        "peak_memory_bytes": peak_memory(),
        "trained_parameters": trained,
        "parameters": total,
    }
    return Outcome(pd.DataFrame(callback.rows), pd.DataFrame(callback.log), training)


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_stage(stage: Stage, outcome: Outcome) -> Path:
    """Measure the trained policy on all splits and write every file of the run. Returns the partial folder."""
    partial = runs.open_run(stage.root, stage.run, stage.seed)
    tables = evaluation_tables(stage.corpus, stage.settings.evaluation.train_size)
    metrics, predictions = measure(stage.policy, stage.tokenizer, stage.settings, tables, stage.references)
    for split, table in predictions.items():
        table.to_parquet(partial / runs.predictions_file(split))
    outcome.trajectory.to_csv(partial / runs.TRAJECTORY, index=False)
    outcome.log.to_csv(partial / "log.csv", index=False)
    models.save_policy(stage.policy, partial / runs.POLICY)
    runs.write_metrics(
        partial,
        stage.study,
        run=stage.run,
        stage=stage.study.run(stage.run).stage,
        parent=stage.parent,
        seed=stage.seed,
        evaluation=metrics,
        training=outcome.training,
        provenance=runs.describe_provenance(
            stage.study,
            stage.started,
            data_sha256=runs.file_hashes(data_folder(stage.study, stage.root), "*.tsv"),
            model=describe_model(stage.study, stage.base),
            run_parameters=stage.settings.model_dump(),
        ),
    )
    return partial
