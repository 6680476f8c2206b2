"""What all stages share, on SFT and RL: what is taught, that runs repeat and go on, and what must stop them."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback
from trl import RewardTrainer, SFTTrainer

from conftest import make_data, tiny
from making import flip
from nondecoupling.study import fingerprint, folders
from nondecoupling.task import prompts
from nondecoupling.task.annotators import with_true_labels
from nondecoupling.task.corpus import load_checked_corpus
from nondecoupling.training.evaluation import evaluation_tables, predict
from nondecoupling.training.models import count_parameters
from nondecoupling.training.stage import (
    checkpoints_of,
    demonstrations,
    prepare_stage,
    run_trainer,
    stage_seed,
    training_rows,
)
from nondecoupling.training.trainer import SILENT_STEPS, FiniteSteps, StageCallback, evaluation_steps, memory_explained
from trainers import Recorder, disturb, gradient, run_trainer_replaced, train, trained_weights, trainer_of


@pytest.fixture(scope="module")
def run_twice(prepare, built_sft):
    """A stage, its outcome, its trained weights, and its metrics and answers on dev (not published)."""
    done = {}

    def run(name, seed=0, again=0, changes=None):
        key = name, seed, again, str(changes)
        if key not in done:
            stage = prepare(name, seed, changes)
            outcome = train(stage)
            metrics, answers = outcome.measure(evaluation_tables(stage.corpus, stage.settings.evaluation))
            done[key] = stage, outcome, trained_weights(stage), metrics["dev"], answers["dev"]
        return done[key]

    return run


# What is taught


def test_sft_loss_covers_the_response_and_its_end_token_only(prepare):
    stage = prepare("sft")
    batch = next(iter(trainer_of(stage).get_train_dataloader()))
    assert len(batch["labels"]) == stage.settings.sft.batch_size
    seen = set()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        taught = labels != -100
        answer = stage.tokenizer.decode(labels[taught])
        place = int(taught.nonzero()[0])
        assert answer in ("acceptable<|im_end|>", "unacceptable<|im_end|>")
        assert torch.equal(ids[taught], labels[taught])
        assert taught.nonzero().flatten().tolist() == list(range(place, place + int(taught.sum())))  # in one piece
        text = stage.tokenizer.decode(ids[:place])
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        seen.add(answer)
    assert len(seen) == 2


def test_sft_teaches_each_sentence_its_own_label(prepare):
    stage = prepare("sft")
    label_of = stage.corpus.set_index("sentence")["label"]
    for batch in trainer_of(stage).get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            question = stage.tokenizer.decode(ids).split("\n\n")[1].partition("<|im_end|>")[0]
            answer = stage.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
            assert prompts.responses(stage.settings.prompt)[label_of[question]] == answer


def test_the_trainers_loss_is_the_cross_entropy_that_is_measured(prepare):
    stage = prepare("sft")
    trainer = trainer_of(stage)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(stage.policy, dict(batch)).item()
    label_of = stage.corpus.set_index("sentence")["label"]
    asked = [stage.tokenizer.decode(ids).split("\n\n")[1].partition("<|im_end|>")[0] for ids in batch["input_ids"]]
    table = pd.DataFrame({"sentence": asked, "label": label_of[asked].to_numpy(), "source": ""})
    answers = predict(stage.policy, stage.tokenizer, stage.settings.prompt, table, batch_size=16, seed=0)
    nats = -np.where(table["label"] == 1, answers["logp_acceptable"], answers["logp_unacceptable"]).sum()
    tokens = int((batch["labels"] != -100).sum())
    assert loss == pytest.approx(nats / tokens, rel=1e-4)


def same_as_plainly(stage, trainer, plainly, batch):
    """Loss and gradient of the trainer's own computation, and of ``plainly`` (of a class of trl's), to 1e-5."""
    disturb(stage.policy)
    found = []
    for compute in (trainer.compute_loss, plainly):
        stage.policy.zero_grad()
        loss = compute(stage.policy, dict(batch))
        loss.backward()
        found.append((loss.detach(), gradient(stage.policy)))
    (loss, slope), (expected, steepest) = found
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (slope - steepest).norm() < max(1e-5 * steepest.norm(), 1e-6)


@pytest.mark.parametrize("common", [True, False], ids=["a common start", "none"])
def test_reading_the_common_start_once_changes_neither_sfts_loss_nor_its_gradient(prepare, common):
    stage = prepare("sft")
    trainer = trainer_of(stage)
    batch = next(iter(trainer.get_train_dataloader()))
    if not common:  # each row begins with a token of its own
        batch["input_ids"][:, 0] = torch.arange(10, 10 + len(batch["input_ids"]))
    assert batch["attention_mask"].sum(1).unique().numel() > 1  # rows of different lengths
    same_as_plainly(stage, trainer, lambda *given: SFTTrainer.compute_loss(trainer, *given), batch)


def test_reading_a_pairs_question_once_changes_neither_the_reward_models_loss_nor_its_gradient(prepare):
    stage = prepare("reward-model")
    trainer = trainer_of(stage)
    batch = next(iter(trainer.get_train_dataloader()))
    same_as_plainly(stage, trainer, lambda *given: RewardTrainer.compute_loss(trainer, *given), batch)


def test_sft_lowers_the_loss_on_what_it_is_taught(run_twice):
    _, outcome, _, _, _ = run_twice("sft", changes={"sft.steps": 12})
    assert outcome.log["step"].tolist() == list(range(1, 13))
    assert outcome.log["loss"].iloc[-3:].mean() < outcome.log["loss"].iloc[:3].mean()


def test_training_leaves_nothing_in_the_working_directory(prepare, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for run in ("sft", "rl"):
        trainer_of(prepare(run)).train()
    assert list(tmp_path.iterdir()) == []


# Demonstrations and labels


def test_a_share_of_the_demonstrations_is_in_the_other_wording(prepare):
    stage = prepare("sft-wordings")
    table = training_rows(stage, 40)
    pairs = demonstrations(stage, table, stage.settings.sft.other_wording_share)
    plain = demonstrations(stage, table)
    told = [stage.tokenizer.decode(answer[:-1]) for _, answer in pairs]
    assert [text.endswith(".") for text in told] == [True] * 4 + [False] * 36
    usual = [prompts.responses(stage.settings.prompt)[label] for label in table["label"]]
    assert [text.removesuffix(".") for text in told] == usual
    assert [stage.tokenizer.decode(answer[:-1]) for _, answer in plain] == usual


def test_a_wording_longer_than_a_sampled_answer_is_refused(prepare):
    stage = prepare("sft-wordings", changes={"prompt.other_wording": "I would say that it is {answer}."})
    with pytest.raises(ValueError, match="more than prompt.max_new_tokens=4"):
        train(stage)


def test_clean_labels_are_the_grammars_verdicts(prepare):
    noisy, clean = prepare("sft").corpus, prepare("sft-clean").corpus
    assert (clean["label"] == (clean["mark"] == "")).all()
    assert (noisy["label"] != clean["label"]).mean() == pytest.approx(0.1, abs=0.01)
    assert with_true_labels(clean).equals(clean)
    assert (noisy["agreement"] == 0.9).all()
    assert (clean["agreement"] == 1.0).all()
    assert clean["truth"].equals(noisy["truth"])


# Data order


def test_training_sentences_are_drawn_by_the_seed(prepare):
    stage = prepare("sft")
    train = stage.corpus[stage.corpus["split"] == "train"]
    rows = training_rows(stage, 50)
    assert len(rows) == rows["sentence"].nunique() == 50
    assert set(rows["split"]) == {"train"}
    pd.testing.assert_frame_equal(rows, training_rows(stage, 50))
    others = training_rows(prepare("sft", seed=1), 50), training_rows(prepare("rl"), 50)
    for other in others:
        assert rows["sentence"].tolist() != other["sentence"].tolist()
    assert sorted(training_rows(stage, 400)["sentence"]) == sorted(train["sentence"])


def test_stages_and_seeds_have_distinct_random_numbers(prepare):
    seeds = [stage_seed(prepare(run)._replace(seed=seed)) for run in ("sft", "rl") for seed in (0, 1, 10)]
    assert len(set(seeds)) == len(seeds)
    without_sweep = prepare("rl", changes={"sweep.betas": []})
    assert len(without_sweep.study.runs) < len(tiny().runs)
    assert stage_seed(without_sweep) == stage_seed(prepare("rl"))  # whatever else is in the plan


# Runs repeat


@pytest.mark.parametrize("run", ["sft", "sft-rl"])
def test_the_same_seed_gives_the_same_run(run_twice, run):
    _, first, weights, metrics, predictions = run_twice(run)
    _, again, same_weights, same_metrics, same_predictions = run_twice(run, again=1)
    pd.testing.assert_frame_equal(first.trajectory, again.trajectory, check_exact=True)
    assert torch.equal(weights, same_weights)
    assert metrics == same_metrics
    pd.testing.assert_frame_equal(predictions, same_predictions, check_exact=True)


def test_another_seed_gives_another_run(run_twice):
    for run in ("sft", "rl"):
        _, first, weights, metrics, _ = run_twice(run)
        _, other, other_weights, other_metrics, _ = run_twice(run, seed=1)
        assert not torch.equal(weights, other_weights)
        assert metrics["sft_loss"] != other_metrics["sft_loss"]
        assert first.trajectory["sft_loss"].iloc[0] != other.trajectory["sft_loss"].iloc[0]  # each has its own base


def test_a_seed_is_a_world_of_its_own(prepare):
    """Its sentences, its base; and nothing is taken from another seed's."""
    one, other = (prepare("sft", seed) for seed in (0, 1))
    assert one.base == one.root / "seed0" / "base" / folders.POLICY
    assert other.base == other.root / "seed1" / "base" / folders.POLICY
    assert other.references == dict.fromkeys(("parent", "base"), other.root / "seed1" / "base")
    assert not one.corpus.equals(other.corpus)
    states = [stage.policy.get_base_model().state_dict() for stage in (one, other)]
    name = "model.layers.0.mlp.up_proj.base_layer.weight"
    assert not torch.allclose(states[0][name], states[1][name], atol=1e-2)
    for seed, stage in enumerate((one, other)):
        for name in ("data", "base"):
            record = folders.read_json(stage.root / f"seed{seed}" / name / folders.METRICS)
            assert record["seed"] == seed
            assert record["provenance"]["data_sha256"] == folders.file_hashes(stage.root / f"seed{seed}/data", "*.tsv")
        answers = pd.read_parquet(stage.references["base"] / folders.answers_file("dev"))
        assert set(answers["sentence"]) == set(stage.corpus.query("split == 'dev'")["sentence"])


@pytest.mark.parametrize("run", ["sft", "sft-rl"])
def test_measuring_more_often_changes_nothing(run_twice, run):
    _, rare, weights, metrics, _ = run_twice(run)
    _, often, same_weights, same_metrics, _ = run_twice(run, changes={"evaluation.points": 4})
    assert len(often.trajectory) > len(rare.trajectory) == 2
    assert torch.equal(weights, same_weights)
    assert metrics == same_metrics


@pytest.mark.parametrize("run", ["sft", "sft-rl", "rl"])
def test_a_trajectory_starts_at_the_parent_and_ends_at_the_result(run_twice, run):
    stage, outcome, _, metrics, _ = run_twice(run)
    parent = folders.read_json(stage.references["parent"] / folders.METRICS)["evaluation"]["dev"]
    first, last = outcome.trajectory.iloc[0], outcome.trajectory.iloc[-1]
    assert first["step"] == 0
    assert last["step"] == outcome.training["steps"]
    assert first["kl_to_parent"] == pytest.approx(0, abs=1e-6)
    for name, value in parent.items():
        if name != "kl_to_parent":
            assert first[name] == pytest.approx(value, abs=1e-6), name
    assert last.drop("step").to_dict() == metrics


def test_what_is_published_is_what_the_policy_measures_again(tiny_sft):
    stage, outcome, folder = tiny_sft
    metrics, answers = outcome.measure(evaluation_tables(stage.corpus, stage.settings.evaluation))
    assert folders.read_json(folder / folders.METRICS)["evaluation"] == metrics
    for split, table in answers.items():
        pd.testing.assert_frame_equal(pd.read_parquet(folder / folders.answers_file(split)), table)
    assert set(outcome.known[0]) == {"dev"}


@pytest.mark.parametrize(
    ("steps", "points", "expected"),
    [(250, 6, [0, 50, 100, 150, 200, 250]), (3, 2, [0, 3]), (2, 6, [0, 1, 2]), (90, 4, [0, 30, 60, 90])],
)
def test_evaluation_steps_by_hand(steps, points, expected):
    assert evaluation_steps(steps, points) == expected


# The reference of RL


@pytest.mark.parametrize("run", ["sft-rl", "rl"])
def test_rl_starts_at_its_reference_and_leaves_it(run_twice, run):
    _, outcome, _, metrics, _ = run_twice(run)
    assert abs(outcome.log["kl"].iloc[0]) < 1e-6
    assert metrics["kl_to_parent"] > 1e-6
    assert set(outcome.log.columns) >= {"step", "loss", "grad_norm", "reward", "kl", "frac_reward_zero_std"}


def test_the_reference_of_full_fine_tuning_is_the_start_too(run_twice):
    stage, outcome, _, metrics, _ = run_twice("rl", changes={"adaptation.method": "full"})
    assert outcome.training["trained_parameters"] == outcome.training["parameters"]
    assert abs(outcome.log["kl"].iloc[0]) < 1e-6
    assert metrics["kl_to_parent"] > 1e-6
    assert count_parameters(stage.policy)[0] == outcome.training["trained_parameters"]


# What must stop a run


def callback_at(step, tolerance=None, max_steps=10):
    state = type("State", (), {"global_step": step, "max_steps": max_steps})
    callback = StageCallback([], lambda: {}, lambda start: None, tolerance)
    return lambda **logs: callback.on_log(None, state, None, logs=logs)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(name, value):
    class Trainer(FiniteSteps):
        state = type("State", (), {"global_step": 7})
        batch = "Is it?"

    with pytest.raises(FloatingPointError, match=f"{name} is {value} at step 7.*'Is it.'.*lower the learning rate"):
        Trainer().log({"loss": 0.1, "grad_norm": 0.2} | {name: value})


def test_sampling_from_weights_that_are_no_numbers_names_step_and_batch(prepare):
    stage = prepare("rl")
    trainer = trainer_of(stage)
    with torch.no_grad():
        next(weight for weight in stage.policy.parameters() if weight.requires_grad).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="a probability is not finite at step 1, in the batch .*acceptable"):
        trainer.train()


def test_a_run_that_diverges_stops(prepare):
    stage = prepare("sft", changes={"sft.learning_rate": 1e30, "sft.warmup_share": 0.0})
    with pytest.raises(
        FloatingPointError, match="at step [12], in the batch that begins with .*acceptable.*: training diverged"
    ):
        train(stage)


def test_finite_numbers_are_logged(capsys):
    callback_at(4)(loss=0.5, grad_norm=1.0, reward=0.25)
    printed = capsys.readouterr().out
    assert "step     4/10  loss 0.5000  reward +0.250" in printed
    callback_at(5)(loss=0.5, grad_norm=1.0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("variable", "quiet"), [("1", True), ("", False)])
def test_the_bar_is_for_those_who_look_on(monkeypatch, variable, quiet):
    from tqdm.notebook import tqdm_notebook

    monkeypatch.setattr("nondecoupling.training.trainer.tqdm", tqdm_notebook)
    monkeypatch.setenv("TQDM_DISABLE", variable)
    state = type("State", (), {"global_step": 1, "max_steps": 10})
    callback = StageCallback([], lambda: {}, lambda start: None, None)
    callback.on_train_begin(None, state, None)
    assert callback.bar.disable == quiet
    callback.bar.close()


@pytest.mark.parametrize("kl", [0.01, -0.01, math.nan])
def test_a_reference_that_is_not_the_start_stops_the_run(kl):
    with pytest.raises(RuntimeError, match="KL to the reference"):
        callback_at(1, tolerance=1e-5)(loss=0.1, kl=kl)
    callback_at(2, tolerance=1e-5)(loss=0.1, kl=kl)
    callback_at(1)(loss=0.1, kl=kl)


def test_rl_without_kl_term_has_no_reference_to_check(run_twice):
    _, outcome, _, _, _ = run_twice("rl", changes={"rl.beta": 0.0})
    assert len(outcome.log) == outcome.training["steps"]


def test_steps_without_any_reward_to_learn_from_are_reported_once(capsys):
    log = callback_at(4, max_steps=1000)
    for _ in range(SILENT_STEPS - 1):
        log(loss=0.0, reward=-1.0, frac_reward_zero_std=1.0)
    assert capsys.readouterr().out == ""
    for _ in range(5):
        log(loss=0.0, reward=-1.0, frac_reward_zero_std=1.0)
    assert capsys.readouterr().out.count("no reward to learn from") == 1
    log(loss=0.0, reward=0.0, frac_reward_zero_std=0.5)
    for _ in range(SILENT_STEPS):
        log(loss=0.0, reward=-1.0, frac_reward_zero_std=1.0)
    assert capsys.readouterr().out.count("no reward to learn from") == 1


def test_silent_groups_are_counted_in_the_runs_result(run_twice):
    _, outcome, _, _, _ = run_twice("rl")
    share = outcome.training["silent_group_share"]
    assert share == pytest.approx(outcome.log["frac_reward_zero_std"].mean(), abs=1e-4)


# Preparing a stage


def test_a_run_of_another_stage_is_refused(tiny_base):
    with pytest.raises(ValueError, match="'rl' is a stage 'rl', not 'sft'"):
        prepare_stage(tiny_base, "rl", 0, expected="sft")


def test_a_parent_that_has_not_been_run_is_named(tiny_base):
    with pytest.raises(FileNotFoundError, match=r"Run 'sft-rl' needs the finished run .*seed99.sft"):
        prepare_stage(tiny_base, "sft-rl", 99, expected="rl")


def test_data_that_changed_since_the_data_run_are_refused(tiny_base, monkeypatch, tmp_path):
    place = tmp_path / "tiny" / "seed1" / "data"
    shutil.copytree(folders.study_folder(tiny_base) / "seed1" / "data", place)
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    assert len(load_checked_corpus(tiny_base, 1)) == 460
    with (place / "in_domain_dev.tsv").open("a") as lines:
        lines.write("x\t1\t\tOne more.\n")
    with pytest.raises(RuntimeError, match="in_domain_dev.tsv is not the file that the run wrote"):
        load_checked_corpus(tiny_base, 1)


def test_a_folder_of_the_users_that_changed_since_the_data_run_is_refused(tiny_base, monkeypatch, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "results"
    shutil.copytree(folders.study_folder(tiny_base) / "seed1" / "data", mine)
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(other))
    study = tiny({"data.folder": str(mine)})
    make_data(study)
    assert len(load_checked_corpus(study, 0)) == 460
    with (mine / "in_domain_dev.tsv").open("a") as lines:
        lines.write("x\t1\t\tOne more.\n")
    with pytest.raises(ValueError, match="in_domain_dev.tsv has sha256 .* run 01_data again"):
        load_checked_corpus(study, 0)


def test_policies_are_measured_on_dev_and_a_part_of_train(prepare):
    stage = prepare("sft")
    tables = evaluation_tables(stage.corpus, stage.settings.evaluation)
    assert {split: len(table) for split, table in tables.items()} == {"dev": 60, "train": 40}
    assert set(tables["train"]["split"]) == {"train"}


# Interruption


class Interrupt(TrainerCallback):
    """Ctrl-C right after a step, as it reaches a stage in the middle of training."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("run", "name", "damage"),
    [
        ("sft", "optimizer.pt", flip),
        ("sft-rl", "adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("sft-rl-random", folders.HASHES, Path.unlink),  # as if it had been interrupted while it was written
        ("joint-m0.5", folders.MEASURED, lambda path: path.write_text(path.read_text().replace("1", "2", 1))),
        ("reward-model", "trainer_state.json", Path.unlink),
    ],
)
def test_an_interrupted_stage_ends_as_if_nothing_had_happened(tiny_sft, prepare, capsys, run, name, damage):
    """Even if the last checkpoint was damaged meanwhile: it goes on from the one before."""
    steps = {f"{section}.steps": 6 for section in ("sft", "rl", "joint", "reward_model")}
    changes = steps | {"evaluation.points": 4}  # measured and saved at steps 0, 2, 4 and 6
    whole = prepare(run, changes=changes)
    expected = train(whole)
    folder = checkpoints_of(whole)
    shutil.rmtree(folder)

    def until_ctrl_c(stage, build, *rest, **more):
        return run_trainer(stage, lambda c: with_callback(build(c), Interrupt(5)), *rest, **more)

    with run_trainer_replaced(until_ctrl_c), pytest.raises(KeyboardInterrupt):
        train(prepare(run, changes=changes))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    damage(folder / "checkpoint-4" / name)

    capsys.readouterr()
    again = prepare(run, changes=changes)
    found = train(again)
    said = capsys.readouterr().out
    assert "going on from checkpoint 2 of 6" in said
    assert ("checkpoint-4 was damaged, and is not used" in said) == (name != folders.HASHES)
    pd.testing.assert_frame_equal(found.trajectory, expected.trajectory)
    shown = ["step", "loss", "grad_norm"]
    pd.testing.assert_frame_equal(found.log[shown], expected.log[shown])
    for (name, weight), (_, other) in zip(
        whole.policy.named_parameters(), again.policy.named_parameters(), strict=True
    ):
        assert torch.equal(weight, other), name
    shutil.rmtree(folder)


def with_callback(trainer, callback):
    trainer.add_callback(callback)
    return trainer


@pytest.fixture
def interrupted(tiny_sft, prepare, monkeypatch, tmp_path):
    """Run `sft-rl` with a checkpoint, and with copies of the results and of the package that a test may edit."""
    root, package = tmp_path / "tiny", tmp_path / "nondecoupling"
    shutil.copytree(tiny_sft.stage.root, root, ignore=shutil.ignore_patterns("*.safetensors", "*.checkpoints"))
    shutil.copytree(fingerprint.PACKAGE, package)
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    stage = prepare("sft-rl")._replace(root=root)
    assert not goes_on(stage)
    checkpoint = checkpoints_of(stage) / "checkpoint-2"
    checkpoint.mkdir()
    measured = {"trajectory": [], "log": [], "seconds": 0.0, "measuring": 0.0}
    folders.write_json(checkpoint / folders.MEASURED, measured)
    folders.write_hashes(checkpoint)
    return stage


def goes_on(stage):
    """Whether a stage begins at its checkpoint; it is not trained."""

    class Idle:
        state = SimpleNamespace(global_step=3)

        def remove_callback(self, callback):
            pass

        def train(self, resume_from_checkpoint):
            self.told = resume_from_checkpoint

    idle = Idle()
    run_trainer(stage, lambda callback: idle, steps=3, samples=1, measure=lambda tables: None, to_lower="")
    assert idle.told in (None, str(checkpoints_of(stage) / "checkpoint-2"))
    return idle.told is not None


@pytest.mark.parametrize(
    ("edited", "kept"),
    [
        ("nondecoupling/analysis/figures.py", True),
        ("nondecoupling/pages/report.py", True),
        ("nondecoupling/training/joint.py", True),  # of another stage
        ("nondecoupling/training/generation.py", False),
        ("tiny/seed0/sft/metrics.json", False),  # the parent's
    ],
)
def test_a_checkpoint_goes_with_the_stages_code_and_parent(interrupted, tmp_path, edited, kept):
    assert goes_on(interrupted)
    with (tmp_path / edited).open("a") as lines:
        lines.write("\n")
    assert goes_on(interrupted) == kept


@pytest.mark.parametrize(("changes", "kept"), [({"rl.beta": 0.25}, False), ({"joint.weight": 0.25}, True)])
def test_a_checkpoint_goes_with_the_stages_settings(interrupted, prepare, changes, kept):
    assert goes_on(prepare("sft-rl", changes=changes)._replace(root=interrupted.root)) == kept


# Memory


@pytest.mark.parametrize(
    ("run", "rows", "passes", "changes"),
    [
        ("sft", 16, "sft.rows_per_pass", {"sft.steps": 1}),
        ("rl", 256, "rl.rows_per_pass", {"rl.steps": 1}),  # four questions: sampled from together in both cases
        ("rl", 256, "rl.rows_per_pass", {"rl.steps": 1, "rl.normalisation": "group"}),
    ],
)
def test_a_step_in_several_passes_is_a_step_in_one(prepare, run, rows, passes, changes):
    """The same sums in another order: gradients must agree to rounding."""
    found = []
    for limit in (rows, 4):
        stage = prepare(run, changes=changes | {passes: limit})
        recorder = Recorder(stage.policy)
        trainer_of(stage, recorder).train()
        found += recorder.gradients
    assert len(found) == 2
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_running_out_of_gpu_memory_names_the_peak_and_the_setting(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2**30)
    card = type("Card", (), {"total_memory": 8 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with (
        pytest.raises(RuntimeError, match=r"7.0 of 8.0 GiB.*lower rl.rows_per_pass or evaluation.batch_size") as caught,
        memory_explained("rl.rows_per_pass", "evaluation.batch_size"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "\n" not in str(caught.value)


def test_only_answers_are_projected_onto_the_vocabulary(prepare):
    """trl projects every token of a prompt on a CPU, most of the work with a real vocabulary."""
    stage, positions = prepare("sft", changes={"sft.steps": 1}), []
    head = stage.policy.get_base_model().lm_head
    head.register_forward_hook(lambda module, given, found: positions.append(math.prod(found.shape[:-1])))
    trainer_of(stage).train()
    answers = stage.settings.sft.batch_size * 2  # one token and its end of turn each
    assert positions == [1, answers]  # the one where the common start ends comes along


def test_a_stage_that_does_not_start_at_its_parent_is_refused(tiny_sft, prepare):
    stage = prepare("sft-rl")
    disturb(stage.policy)  # as if its base had been exchanged
    with pytest.raises(RuntimeError, match=r"'sft-rl' does not start where 'sft' ended: their KL on dev is"):
        train(stage)


def test_a_stage_that_takes_fewer_steps_than_it_should_is_no_result(prepare):
    stage = prepare("rl", changes={"rl.steps": 3})
    short = stage.corpus[stage.corpus["split"] != "train"]
    few = stage.corpus[stage.corpus["split"] == "train"].head(stage.settings.rl.prompts_per_step - 1)
    with pytest.raises((RuntimeError, ValueError)):
        train(stage._replace(corpus=pd.concat([short, few])))
