"""What every stage of training begins and ends with: all it needs, loaded and checked, and its files."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from transformers import PrinterCallback, TrainerCallback

from nondecoupling.study import folders, provenance
from nondecoupling.study.fingerprint import fingerprint
from nondecoupling.study.plan import Run
from nondecoupling.study.profile import Joint, Profile, RewardModel, Rl, Sft
from nondecoupling.study.study import Study
from nondecoupling.task import annotators
from nondecoupling.task import corpus as corpora
from nondecoupling.task.prompts import check_chats, other_wordings, prompt_ids, response_ids, responses
from nondecoupling.task.seeds import seed_of
from nondecoupling.training import models
from nondecoupling.training.base import base_folder
from nondecoupling.training.evaluation import Measured, evaluation_tables, measure_policy
from nondecoupling.training.trainer import (
    Measure,
    Outcome,
    StageCallback,
    evaluation_steps,
    kept_in_float32,
    memory_explained,
    peak_memory,
)


class Stage(NamedTuple):
    """All that a stage needs, loaded and checked.

    The study's results are under ``root``; ``references`` are the folders of the parent and of the base.
    """

    study: Study
    run: Run
    seed: int
    settings: Profile
    root: Path
    base: Path
    corpus: pd.DataFrame
    tokenizer: Any
    policy: Any
    references: dict[str, Path]
    started: datetime
    proxy: Any = None  # the reward model that pays, where rl.reward is "proxy"


def prepare_stage(study: Study, name: str, seed: int, expected: str) -> Stage:
    """Load corpus, tokenizer and the parent's policy for one run of the plan, or a new reward model.

    Raises ValueError if the run is not of the ``expected`` stage, FileNotFoundError if its parent has not been run,
    RuntimeError where make makes the study and this is run by hand.
    """
    models.prepare_libraries()
    started, root, run = provenance.now(), folders.study_folder(study), study.run(name)
    folders.refuse_beside_make(root)
    settings = study.settings_of(run)
    if run.stage != expected:
        raise ValueError(f"Run '{name}' is a stage '{run.stage}', not '{expected}'; use the notebook of that stage.")
    base_run, parent = study.base_of(run), study.run(str(run.parent))
    references = {"parent": folders.run_folder(root, parent, seed), "base": folders.run_folder(root, base_run, seed)}
    proxy_folder = folders.run_folder(root, study.run(run.proxy), seed) if run.proxy else None
    for folder in [*references.values(), *([proxy_folder] if proxy_folder else [])]:
        folders.require_complete(folder, f"Run '{name}'")
    corpus, base = corpora.load_checked_corpus(study, seed), base_folder(study, base_run, seed)
    if settings.data.labels == "truth":
        corpus = annotators.with_true_labels(corpus)
    tokenizer = models.load_tokenizer(base)
    check_chats(tokenizer, settings.prompt, corpus["sentence"])
    how, adaptation, pad = settings.model, settings.adaptation, tokenizer.pad_token_id
    if expected == "reward_model":
        policy = models.start_reward_model(base, None, how, adaptation, seed, pad)
    else:
        trained = None if parent == base_run else references["parent"] / folders.POLICY
        policy = models.start_policy(base, trained, how, adaptation, seed)
    proxy = None
    if proxy_folder:
        proxy = models.start_reward_model(base, proxy_folder / folders.POLICY, how, adaptation, seed, pad)
    return Stage(study, run, seed, settings, root, base, corpus, tokenizer, policy, references, started, proxy)


def stage_seed(stage: Stage) -> int:
    """Seed of a stage's data order and sampling."""
    return seed_of(stage.run.name, stage.seed)


def training_rows(stage: Stage, count: int, draw: int = 0) -> pd.DataFrame:
    """``count`` training sentences in an order drawn by the stage's seed (all of them where there are fewer).

    A stage that draws twice, for two purposes, numbers its draws.
    """
    train = stage.corpus[stage.corpus["split"] == "train"]
    return train.sample(min(count, len(train)), random_state=stage_seed(stage) + draw).reset_index(drop=True)


def demonstrations(stage: Stage, table: pd.DataFrame, other_wording_share: float = 0.0) -> list[tuple[list, list]]:
    """Token ids of the question about each sentence of ``table`` and of its right answer.

    The first ``other_wording_share`` of the answers are in the prompt's other wording; ``table`` is in random order,
    and trainers shuffle. Raises ValueError if such an answer is longer than a sampled one may be.
    """
    prompt, tokenizer = stage.settings.prompt, stage.tokenizer
    usual, other = (
        [response_ids(tokenizer, text) for text in texts] for texts in (responses(prompt), other_wordings(prompt))
    )
    reworded, longest = round(other_wording_share * len(table)), max(map(len, other))
    if reworded and longest > prompt.max_new_tokens:
        raise ValueError(
            f"An answer in prompt.other_wording has {longest} tokens, more than prompt.max_new_tokens="
            f"{prompt.max_new_tokens}; shorten the wording or raise the limit."
        )
    questions = prompt_ids(tokenizer, prompt, table["sentence"])
    return [
        (question, (other if place < reworded else usual)[label])
        for place, (question, label) in enumerate(zip(questions, table["label"], strict=True))
    ]


def shared_arguments(stage: Stage, settings: Sft | Rl | Joint | RewardModel) -> dict[str, Any]:
    """Trainer arguments that all stages share; those that differ from the defaults say why."""
    return {
        "output_dir": str(checkpoints_of(stage)),
        "save_strategy": "no",  # StageCallback asks for checkpoints
        "save_total_limit": 2,  # the older one serves where an interruption leaves the newer one incomplete
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,  # every step is checked for finite numbers
        "logging_nan_inf_filter": False,  # the default hides them
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup_share,  # a float is a share of all steps
        "lr_scheduler_type": settings.schedule,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,  # trl's default is True, also on a CPU
        "gradient_checkpointing": False,  # trl's default is True; sequences here are short
        "seed": stage_seed(stage),
        "use_cpu": not torch.cuda.is_available(),
    }


def checkpoints_of(stage: Stage) -> Path:
    """Where the stage keeps its checkpoints until it is finished."""
    return folders.checkpoints_folder(stage.root, stage.run, stage.seed)


def run_trainer(
    stage: Stage,
    build: Callable[[TrainerCallback], Any],
    steps: int,
    samples: int,
    measure: Measure,
    to_lower: str,
    check_start: Callable[[dict[str, float]], None] = lambda start: None,
    refers: bool = False,
) -> Outcome:
    """Train with the trainer that ``build`` returns, from the last checkpoint if there is one.

    ``samples`` are the answers that the stage reads, for its speed; ``measure`` measures the policy as it is;
    ``to_lower`` is the setting that saves memory. ``check_start`` judges the first metrics; ``refers`` says that the
    first step has a KL to the policy that the stage starts from, which must then be 0. Raises RuntimeError where a
    stage does not start at its parent, or does not take its steps.
    """
    settings = stage.settings
    dev = corpora.fixed_subset(stage.corpus, "dev", settings.evaluation.along_size)
    # Only where arithmetic is exact do two passes over the same rows agree to the last digits.
    exact = settings.model.dtype == "float32" and settings.model.quantization == "none"
    tolerance = 1e-5 if exact else 1e-2  # nats of KL

    last: Measured = {}, {}

    def measure_dev() -> dict[str, float]:
        nonlocal last
        last = measure({"dev": dev})
        return last[0]["dev"]

    def begin(start: dict[str, float]) -> None:
        require_parents_end(stage, start, tolerance)
        check_start(start)

    callback = StageCallback(
        evaluation_steps(steps, settings.evaluation.points),
        measure_dev,
        begin,
        reference_tolerance=tolerance if refers else None,
    )
    parents = folders.parent_hashes(stage.study, stage.root, stage.run, stage.seed)
    identity = fingerprint(stage.study, stage.run.name) | {"parents": parents}
    checkpoint = folders.last_checkpoint(checkpoints_of(stage), identity)
    with kept_in_float32(stage.policy):
        trainer = build(callback)
    trainer.remove_callback(PrinterCallback)
    if checkpoint:
        callback.resume(checkpoint)
        print(f"going on from {checkpoint.name.replace('-', ' ')} of {steps}")
    with memory_explained(to_lower, "evaluation.batch_size"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step != steps:
        raise RuntimeError(
            f"Run '{stage.run.name}' took {trainer.state.global_step} of its {steps} steps: there are too few sentences"
            f" for a step; lower the batch (sft.batch_size, rl.prompts_per_step) or give more."
        )
    log = pd.DataFrame(callback.log)
    training = cost_of(stage, callback, steps, samples)
    if "frac_reward_zero_std" in log:
        training["silent_group_share"] = round(float(log["frac_reward_zero_std"].mean()), 4)
    known: Measured = last if settings.evaluation.along_size is None else ({}, {})
    return Outcome(pd.DataFrame(callback.rows), log, training, measure, known)


def require_parents_end(stage: Stage, start: dict[str, float], tolerance: float) -> None:
    """RuntimeError where a stage's first metrics, ``start``, are not those of the policy that its parent ended with."""
    if not start.get("kl_to_parent", 0.0) < tolerance:
        raise RuntimeError(
            f"Run '{stage.run.name}' does not start where '{stage.run.parent}' ended: their KL on dev is "
            f"{start['kl_to_parent']:.1g} nats. The model in {stage.base} is not the one that was trained before."
        )


def cost_of(stage: Stage, callback: StageCallback, steps: int, samples: int) -> dict[str, Any]:
    """What training cost: steps, seconds (measurements among them, and apart), answers a second, bytes, parameters."""
    seconds, (trained, total) = callback.seconds(), models.count_parameters(stage.policy)
    return {
        "steps": steps,
        "wall_seconds": round(seconds, 2),
        "evaluation_seconds": round(callback.measuring, 2),
        "samples_per_second": round(samples / (seconds - callback.measuring), 1),
        "peak_memory_bytes": peak_memory(),
        "trained_parameters": trained,
        "parameters": total,
    }


def policy_measure(stage: Stage) -> Measure:
    """How a stage that trains a policy measures it."""
    known = stage.settings, stage.seed
    return lambda tables: measure_policy(stage.policy, stage.tokenizer, *known, tables, stage.references)


def publish_stage(stage: Stage, outcome: Outcome) -> Path:
    """Measure the trained policy on all splits, write every file of the run and publish it; returns its folder."""
    partial, (metrics, answers) = folders.open_run(stage.root, stage.run, stage.seed), outcome.known
    tables = evaluation_tables(stage.corpus, stage.settings.evaluation)
    with memory_explained("evaluation.batch_size"):
        more = outcome.measure({split: table for split, table in tables.items() if split not in metrics})
    metrics, answers = metrics | more[0], answers | more[1]
    for split, table in answers.items():
        table.to_parquet(partial / folders.answers_file(split))
    outcome.trajectory.to_csv(partial / folders.TRAJECTORY, index=False)
    outcome.log.to_csv(partial / folders.LOG, index=False)
    models.save_policy(stage.policy, partial / folders.POLICY)
    base = folders.read_json(stage.references["base"] / folders.METRICS)["provenance"]
    known = {name: base[name] for name in ("data_sha256", "model")}
    provenance.write_metrics(
        stage.root, partial, stage.study, stage.run, stage.seed, stage.started, metrics, outcome.training, **known
    )
    return folders.publish(partial)
