"""What this project adds to every trainer of trl's: measurements, checkpoints, progress, and stops that say why."""

import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from nondecoupling.study import folders
from nondecoupling.training.evaluation import Measured

SILENT_STEPS = 10  # steps without any reward to learn from after which a line says so

Measure = Callable[[dict[str, pd.DataFrame]], Measured]  # of the policy as it is now, on sentences by split


class Outcome(NamedTuple):
    """What a stage produced: measurements along the way, the trainer's log, its cost, and how to measure its end.

    ``known`` is what was measured of its end already: dev, where all of it is measured along the way.
    """

    trajectory: pd.DataFrame
    log: pd.DataFrame
    training: dict[str, Any]
    measure: Measure
    known: Measured


def evaluation_steps(steps: int, points: int) -> list[int]:
    """``points`` steps from 0 to ``steps``, evenly spread."""
    return sorted({round(step) for step in np.linspace(0, steps, points)})


class StageCallback(TrainerCallback):
    """Measures the policy at given steps, writes a checkpoint there, shows progress, and stops what has gone wrong.

    Progress is a bar with the time left, or five lines where TQDM_DISABLE=1 says that nobody is watching.

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
        """Wall time of the stage; of interrupted attempts, what was kept counts."""
        return self.earlier + time.perf_counter() - self.started

    def measure_if_due(self, step: int) -> None:
        if step in self.at:
            start = time.perf_counter()
            self.rows.append({"step": step, **self.measure_policy()})
            self.measuring += time.perf_counter() - start

    def resume(self, checkpoint: Path) -> None:
        """Take over what was measured up to ``checkpoint``."""
        measured = folders.read_json(checkpoint / folders.MEASURED)
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
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        measured = {"trajectory": self.rows, "log": self.log, "seconds": self.seconds(), "measuring": self.measuring}
        folders.write_json(folder / folders.MEASURED, measured)
        folders.write_hashes(folder)  # last: a checkpoint that has them is whole

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
        elif state.global_step in evaluation_steps(state.max_steps, 6)[1:]:
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

    def floating_point_ops(self, inputs):
        return 0  # transformers' count goes through all modules at every step, for a number that nobody reads

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


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage also counts the process that this one was started from
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def kept_in_float32(policy: Any) -> Iterator[None]:
    """Give ``policy`` its trainable weights back afterwards: trl casts the adapter of an 8-bit model to bfloat16."""
    weights = {name: weight.data for name, weight in policy.named_parameters() if weight.requires_grad}
    yield
    for name, weight in policy.named_parameters():
        if name in weights:
            weight.data = weights[name]
