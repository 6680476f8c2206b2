"""What all stages share, and those that learn from given answers: supervised fine-tuning (SFT) and the reward model.

A stage writes a checkpoint whenever it measures the policy, and an interrupted one goes on from there.
"""

import gc
import math
import os
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import trl.trainer.utils
from datasets import Dataset
from scipy.special import log_expit, softmax
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import (
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from nondecoupling import corpus as corpora
from nondecoupling import hub, models, runs
from nondecoupling.evaluation import label_log_probabilities, predict, summarise
from nondecoupling.profile import Evaluation, Joint, Profile, Reward, Rl, Sft, Study
from nondecoupling.prompts import (
    check_prefix,
    other_wordings,
    prompt_ids,
    response_ids,
    responses,
)

# trl projects every position onto the vocabulary where there is no GPU, prompts included, so that compiled shapes stay
# fixed. Nothing is compiled here, and prompts carry no loss.
trl.trainer.utils._use_triton = lambda device: True

SILENT_STEPS = 10  # steps without any reward to learn from after which a line says so


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
    proxy: Any = None  # the reward model that pays, where rl.reward is "proxy"
    proxy_scores: dict[str, np.ndarray] | None = None  # its `label_scores` by split, kept once they are known


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


def base_folder(study: Study, root: Path, run: str = "base") -> Path:
    """Where a base model's files are; downloads them where the profile names a hub id that is not in the cache."""
    model = study.profile.model
    if model.folder:
        return Path(model.folder)
    if model.hub:
        return hub.fetch_model(model.hub, str(model.revision))
    return root / run / runs.POLICY


def describe_model(study: Study, base: Path) -> dict[str, Any]:
    """Which base model this is: id, revision and the sha256 of its weights.

    Raises ValueError with both hashes where the profile pins other weights for its hub id.
    """
    model, hashes = study.profile.model, runs.file_hashes(base, "*.safetensors")
    if model.folder:
        return {"id": Path(model.folder).name, "sha256": hashes}
    if not model.hub:
        return {"id": "pretrained by 02_base", "sha256": hashes}
    if model.sha256 and list(hashes.values()) != [model.sha256]:
        raise ValueError(f"The weights in {base} have sha256 {hashes}, but the profile pins {model.sha256}.")
    return {"id": model.hub, "revision": model.revision, "sha256": hashes}


def prepare_stage(study: Study, run: str, seed: int, expected: str) -> Stage:
    """Load corpus, tokenizer and the parent's policy for one run of the plan (for stage "reward" a new reward model).

    Raises ValueError if the run is not of the ``expected`` stage, FileNotFoundError if its parent has not been run.
    """
    gc.freeze()  # what was imported stays; without this the process takes another second to end
    started = runs.now()
    plan, settings, root = study.run(run), study.for_run(run), runs.study_folder(study)
    if plan.stage != expected:
        raise ValueError(f"Run '{run}' is a stage '{plan.stage}', not '{expected}'; use the notebook of that stage.")
    base_run = study.base_of(run)
    folders = {"parent": runs.run_folder(root, plan.parent, seed), "base": root / base_run}
    proxy_folder = runs.run_folder(root, plan.proxy, seed) if plan.proxy else None
    for folder in [*folders.values(), *([proxy_folder] if proxy_folder else [])]:
        runs.require_complete(folder, f"Run '{run}'")
    corpus, base = load_checked_corpus(study, root), base_folder(study, root, base_run)
    if settings.data.labels == "truth":
        corpus = corpora.with_true_labels(corpus)
    tokenizer = models.load_tokenizer(base)
    check_prefix(tokenizer, settings.prompt, corpus["sentence"].iloc[0])
    pad = tokenizer.pad_token_id
    if expected == "reward":
        policy = models.start_reward_model(base, None, settings.model, settings.adaptation, seed, pad)
    else:
        parent_policy = None if plan.parent == base_run else folders["parent"] / runs.POLICY
        policy = models.start_policy(base, parent_policy, settings.model, settings.adaptation, seed)
    proxy = None
    if proxy_folder:
        trained = proxy_folder / runs.POLICY
        proxy = models.start_reward_model(base, trained, settings.model, settings.adaptation, seed, pad)
    return Stage(
        study, run, plan.parent, seed, settings, root, base, corpus, tokenizer, policy, folders, started, proxy, {}
    )


def evaluation_tables(corpus: pd.DataFrame, evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """The sentences on which finished policies are measured: dev splits whole, and a fixed part of train."""
    sizes = {"dev": None, "dev_out": None, "train": evaluation.train_size}
    return {
        split: corpora.fixed_subset(corpus, split, sizes[split]).reset_index(drop=True)
        for split in evaluation.splits
        if (corpus["split"] == split).any()
    }


def measure(
    model: Any, tokenizer: Any, settings: Profile, tables: dict[str, pd.DataFrame], references: dict[str, Path]
) -> tuple[dict[str, dict[str, float]], dict[str, pd.DataFrame]]:
    """Metrics and predictions of a policy on each of ``tables``; ``references`` are finished runs to take KL from."""
    unacceptable, acceptable = (len(response_ids(tokenizer, text)) for text in responses(settings.prompt))
    metrics, predictions = {}, {}
    for split, table in tables.items():
        predictions[split] = predict(model, tokenizer, settings.prompt, table, settings.evaluation)
        # A table may hold some of the split's sentences only; its index says which.
        known = {name: runs.read_predictions(folder, split).iloc[table.index] for name, folder in references.items()}
        metrics[split] = summarise(predictions[split], settings.prompt, (unacceptable, acceptable), known)
    return metrics, predictions


def evaluation_steps(steps: int, points: int) -> list[int]:
    """``points`` steps from 0 to ``steps``, evenly spread."""
    return sorted({round(step) for step in np.linspace(0, steps, points)})


class StageCallback(TrainerCallback):
    """Measures the policy at given steps, writes a checkpoint there, shows progress, and stops what has gone wrong.

    Progress is a bar with the time left, or five lines where TQDM_DISABLE=1 says that nobody looks on.

    ``measure_policy`` returns the metrics of one point of the trajectory, ``check_start`` judges the first of them, and
    ``reference_tolerance`` is how far the first step's KL to the reference may be from 0 (None: there is no reference).
    """

    def __init__(
        self,
        at: list[int],
        measure_policy: Callable[[], dict[str, float]],
        check_start: Callable[[dict[str, float]], None],
        reference_tolerance: float | None,
    ) -> None:
        self.at, self.measure_policy, self.check_start = at, measure_policy, check_start
        self.reference_tolerance = reference_tolerance
        self.rows: list[dict[str, float]] = []
        self.log: list[dict[str, float]] = []
        self.silent = 0  # steps in a row without a group whose answers earn differently
        self.started, self.earlier, self.measuring = time.perf_counter(), 0.0, 0.0
        self.bar = tqdm(disable=True)

    def seconds(self) -> float:
        """Wall time of the stage, that of interrupted attempts up to their last checkpoint included."""
        return self.earlier + time.perf_counter() - self.started

    def measure_if_due(self, step: int) -> None:
        if step in self.at:
            start = time.perf_counter()
            self.rows.append({"step": step, **self.measure_policy()})
            self.measuring += time.perf_counter() - start

    def resume(self, checkpoint: Path) -> None:
        """Take over what was measured up to ``checkpoint``."""
        measured = runs.read_json(checkpoint / runs.MEASURED)
        self.rows, self.log = measured["trajectory"], measured["log"]
        self.earlier, self.measuring = measured["seconds"], measured["measuring"]

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        quiet = os.environ.get("TQDM_DISABLE") == "1"  # tqdm's bar for notebooks does not ask by itself
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=quiet)
        if state.global_step == 0:
            self.measure_if_due(0)
            self.check_start(self.rows[0])

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        self.measure_if_due(state.global_step)
        control.should_save = state.global_step in self.at and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs):
        # Written last: a checkpoint with this file is whole.
        measured = {"trajectory": self.rows, "log": self.log, "seconds": self.seconds(), "measuring": self.measuring}
        runs.write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / runs.MEASURED, measured)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        tolerance = self.reference_tolerance
        if state.global_step == 1 and tolerance is not None and not abs(logs["kl"]) < tolerance:
            raise RuntimeError(f"KL to the reference is {logs['kl']:.2g} before the first update; it must be 0.")
        self.silent = self.silent + 1 if logs.get("frac_reward_zero_std") == 1.0 else 0
        if self.silent == SILENT_STEPS:
            print(
                f"step {state.global_step}: in the last {SILENT_STEPS} steps all answers to a question earned the "
                f"same: there is no reward to learn from"
            )
        self.log.append({"step": state.global_step, **{k: v for k, v in logs.items() if isinstance(v, int | float)}})
        if not self.bar.disable:
            self.bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("loss", "reward") if name in logs})
        elif state.global_step % max(1, state.max_steps // 5) == 0:
            left = self.seconds() / state.global_step * (state.max_steps - state.global_step)
            earned = f"  reward {logs['reward']:+.3f}" if "reward" in logs else ""
            print(f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}{earned}  {left:.0f} s left")


class FiniteSteps:
    """What all trainers add to trl's: they stop at the first number that is not finite, and say in which batch."""

    batch = ""  # the question that the current batch begins with

    def training_step(self, model, inputs, *args, **kwargs):
        if isinstance(inputs, list):  # GRPO's rows, before answers are sampled
            self.batch = inputs[0]["prompt"][-1]["content"]
        else:
            ids = inputs["input_ids"][0]
            self.batch = self.processing_class.decode(ids[inputs["labels"][0] == -100] if "labels" in inputs else ids)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except FloatingPointError as error:
            raise self.diverged(str(error), self.state.global_step + 1) from None

    def log(self, logs, *args, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise self.diverged(f"{name} is {logs[name]}", self.state.global_step)
        super().log(logs, *args, **kwargs)

    def diverged(self, what: str, step: int) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {step}, in the batch that begins with {self.batch!r}: training diverged; lower the "
            f"learning rate. The last checkpoint is kept."
        )


@contextmanager
def memory_explained(*settings: str) -> Iterator[None]:
    """Turn running out of GPU memory into one sentence with the peak and the settings to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() / 2**30
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
        raise RuntimeError(
            f"Out of GPU memory: {peak:.1f} of {size:.1f} GiB were in use at the peak; lower {' or '.join(settings)} "
            f"(SET=...). Finished runs and the last checkpoint are kept."
        ) from None


def shared_arguments(stage: Stage, settings: Sft | Rl | Joint | Reward) -> dict[str, Any]:
    """Trainer arguments that all stages share; those that differ from the defaults say why."""
    return {
        "output_dir": str(runs.checkpoints_folder(stage.root, stage.run, stage.seed)),
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


def stage_seed(stage: Stage) -> int:
    """Seed of a stage's data order and sampling, from the names alone: other runs in the plan change nothing."""
    return zlib.crc32(f"{stage.run} {stage.seed}".encode())


def training_rows(stage: Stage, count: int, draw: int = 0) -> pd.DataFrame:
    """``count`` training sentences in an order drawn by the stage's seed (all of them where there are fewer).

    A stage that needs sentences for two purposes numbers its draws.
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

    return run_trainer(stage, build, sft.steps, sft.steps * sft.batch_size)


class DemonstrationTrainer(FiniteSteps, SFTTrainer):
    """SFTTrainer that stops on numbers that are not finite."""


class PreferenceTrainer(FiniteSteps, RewardTrainer):
    """RewardTrainer that stops on numbers that are not finite."""


def train_reward(stage: Stage) -> Outcome:
    """A reward model by trl's RewardTrainer: -log sigmoid(score of the right answer - score of the wrong one).

    Its optimum is the log-odds of the label (Bradley and Terry): where annotators disagree it says by how much.
    """
    settings, prompt, tokenizer = stage.settings.reward, stage.settings.prompt, stage.tokenizer
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

    return run_trainer(stage, build, settings.steps, settings.steps * settings.pairs_per_step)


def label_scores(reward_model: Any, stage: Stage, table: pd.DataFrame) -> np.ndarray:
    """(sentences, 2) scores that a reward model gives the two answers to each sentence, indexed by label."""
    answers = [response_ids(stage.tokenizer, text) for text in responses(stage.settings.prompt)]
    questions = prompt_ids(stage.tokenizer, stage.settings.prompt, table["sentence"])
    rows = [question + answer for question in questions for answer in answers]
    return np.reshape(models.scores(reward_model, rows, stage.settings.evaluation.batch_size), (-1, 2))


def scores_by_proxy(stage: Stage, split: str, table: pd.DataFrame) -> np.ndarray:
    """`label_scores` of the stage's proxy, computed once: neither it nor the sentences change during a stage."""
    known = stage.proxy_scores if stage.proxy_scores is not None else {}
    key = f"{split} {len(table)}"
    if key not in known:
        known[key] = label_scores(stage.proxy, stage, table)
    return known[key]


def measure_reward_model(
    stage: Stage, tables: dict[str, pd.DataFrame]
) -> tuple[dict[str, dict[str, float]], dict[str, pd.DataFrame]]:
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
            "majority_reward": corpora.majority_reward(table["label"]),
            "accuracy": float((margin > 0).mean()),
            "margin": float(margin.mean()),
            "pair_loss": float(-log_expit(margin).mean()),
        }
        predictions[split] = table[["sentence", "label", "source"]].assign(
            score_acceptable=scored[:, 1], score_unacceptable=scored[:, 0]
        )
    stage.policy.train(training)
    return metrics, predictions


def measure_stage(
    stage: Stage, tables: dict[str, pd.DataFrame]
) -> tuple[dict[str, dict[str, float]], dict[str, pd.DataFrame]]:
    """Metrics and predictions of the stage's policy, or of its reward model, on each of ``tables``.

    Where a proxy pays, ``reward_proxy`` is its mean score of the policy's answers, from the two labels' probabilities.
    """
    if stage.study.run(stage.run).stage == "reward":
        return measure_reward_model(stage, tables)
    metrics, predictions = measure(stage.policy, stage.tokenizer, stage.settings, tables, stage.references)
    if stage.proxy is not None:
        for split, table in tables.items():
            likely = softmax(label_log_probabilities(predictions[split]), axis=1)
            metrics[split]["reward_proxy"] = float((likely * scores_by_proxy(stage, split, table)).sum(1).mean())
    return metrics, predictions


def run_trainer(
    stage: Stage,
    build: Callable[[TrainerCallback], Any],
    steps: int,
    samples: int,
    check_start: Callable[[dict[str, float]], None] = lambda start: None,
    refers: bool = False,
) -> Outcome:
    """Train with the trainer that ``build`` returns, from the last checkpoint if there is one, and measure dev.

    ``samples`` are the answers that the stage reads, for its speed. ``check_start`` judges the first metrics;
    ``refers`` says that the first step has a KL to the policy that the stage starts from, which must then be 0.
    """
    settings, kind = stage.settings, stage.study.run(stage.run).stage
    dev = corpora.fixed_subset(stage.corpus, "dev", settings.evaluation.along_size)

    def measure_policy() -> dict[str, float]:
        metrics, _ = measure_stage(stage, {"dev": dev})
        return metrics["dev"]

    # Only where arithmetic is exact do two passes over the same rows agree to the last digits.
    exact = settings.model.dtype == "float32" and settings.model.quantization == "none"
    callback = StageCallback(
        evaluation_steps(steps, settings.evaluation.points),
        measure_policy,
        check_start,
        reference_tolerance=None if not refers else 1e-5 if exact else 1e-2,
    )
    checkpoints = runs.checkpoints_folder(stage.root, stage.run, stage.seed)
    checkpoint = runs.last_checkpoint(checkpoints, stage_identity(stage))
    weights = {name: weight.data for name, weight in stage.policy.named_parameters() if weight.requires_grad}
    trainer = build(callback)
    for name, weight in stage.policy.named_parameters():
        if name in weights:
            weight.data = weights[name]  # trl casts the adapter of an 8-bit model to bfloat16, which rounds it
    trainer.remove_callback(PrinterCallback)
    if checkpoint:
        callback.resume(checkpoint)
        print(f"going on from {checkpoint.name.replace('-', ' ')} of {steps}")
    lower = {"rl": "rl.rows_per_pass", "joint": "rl.rows_per_pass", "reward": "reward.pairs_per_step"}
    with memory_explained(lower.get(kind, "sft.rows_per_pass"), "evaluation.batch_size"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, (trained, total) = callback.seconds(), models.count_parameters(stage.policy)
    training = {
        "steps": steps,
        "wall_seconds": round(seconds, 2),
        "evaluation_seconds": round(callback.measuring, 2),
        "samples_per_second": round(samples / (seconds - callback.measuring), 1),
        "peak_memory_bytes": peak_memory(),
        "trained_parameters": trained,
        "parameters": total,
    }
    log = pd.DataFrame(callback.log)
    if "frac_reward_zero_std" in log:
        training["silent_group_share"] = round(float(log["frac_reward_zero_std"].mean()), 4)
    return Outcome(pd.DataFrame(callback.rows), log, training)


def stage_identity(stage: Stage) -> dict[str, Any]:
    """What a checkpoint must have been written by to be continued: the same settings, parent and code."""
    return {
        "run": stage.run,
        "settings": stage.settings.model_dump(),
        "parents": {name: runs.file_hashes(folder, runs.METRICS) for name, folder in stage.references.items()},
        "code": runs.file_hashes(Path(__file__).parent, "*.py"),
    }


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage also counts the process that this one was started from
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_stage(stage: Stage, outcome: Outcome) -> Path:
    """Measure the trained policy on all splits and write every file of the run. Returns the partial folder."""
    partial = runs.open_run(stage.root, stage.run, stage.seed)
    tables = evaluation_tables(stage.corpus, stage.settings.evaluation)
    with memory_explained("evaluation.batch_size"):
        metrics, predictions = measure_stage(stage, tables)
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
            model=runs.read_json(stage.references["base"] / runs.METRICS)["provenance"]["model"],
            run_parameters=stage.settings.model_dump(),
        ),
    )
    return partial
