"""The two stages: what is taught, that the RL gradient is that of the theory's objective, and that runs repeat."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import trl
from transformers import TrainerCallback
from trl import GRPOTrainer

from nondecoupling import prompts, reinforcement, runs, training
from nondecoupling.evaluation import predict
from nondecoupling.profile import load_study
from nondecoupling.training import StageCallback


@pytest.fixture(scope="module")
def run_twice(prepare, built_sft):
    """Trajectory and log of a run, its final adapter, and the folder it was written to (not published)."""
    done = {}

    def run(name, seed=0, again=0, changes=None):
        key = name, seed, again, str(changes)
        if key not in done:
            stage = prepare(name, seed, changes)
            outcome = (
                training.train_sft(stage) if stage.study.run(name).stage == "sft" else reinforcement.train_rl(stage)
            )
            metrics, predictions = measure_dev(stage)
            done[key] = stage, outcome, trained_weights(stage), metrics, predictions
        return done[key]

    return run


def measure_dev(stage):
    tables = training.evaluation_tables(stage.corpus, stage.settings.evaluation)
    metrics, predictions = training.measure(stage.policy, stage.tokenizer, stage.settings, tables, stage.references)
    return metrics["dev"], predictions["dev"]


def trained_weights(stage):
    """All trainable weights; trl's frozen reference is not among them."""
    return torch.cat([w.detach().flatten() for w in stage.policy.parameters() if w.requires_grad])


def trainer_of(stage, monkeypatch, callback=None):
    """The trainer that a stage would run, without running it."""
    for module in (training, reinforcement):
        monkeypatch.setattr(module, "run_trainer", lambda stage, build, *_, **__: build(callback or TrainerCallback()))
    return training.train_sft(stage) if stage.study.run(stage.run).stage == "sft" else reinforcement.train_rl(stage)


# What is taught


def test_sft_loss_covers_the_response_and_its_end_token_only(prepare, monkeypatch):
    stage = prepare("sft")
    batch = next(iter(trainer_of(stage, monkeypatch).get_train_dataloader()))
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


def test_sft_teaches_each_sentence_its_own_label(prepare, monkeypatch):
    stage = prepare("sft")
    label_of = stage.corpus.set_index("sentence")["label"]
    for batch in trainer_of(stage, monkeypatch).get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            question = stage.tokenizer.decode(ids).split("\n\n")[1].partition("<|im_end|>")[0]
            answer = stage.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
            assert prompts.responses(stage.settings.prompt)[label_of[question]] == answer


def test_the_trainers_loss_is_the_cross_entropy_that_is_measured(prepare, monkeypatch):
    stage = prepare("sft")
    trainer = trainer_of(stage, monkeypatch)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(stage.policy, dict(batch)).item()
    label_of = stage.corpus.set_index("sentence")["label"]
    asked = [stage.tokenizer.decode(ids).split("\n\n")[1].partition("<|im_end|>")[0] for ids in batch["input_ids"]]
    table = pd.DataFrame({"sentence": asked, "label": label_of[asked].to_numpy(), "source": ""})
    answers = predict(stage.policy, stage.tokenizer, stage.settings.prompt, table, stage.settings.evaluation)
    nats = -np.where(table["label"] == 1, answers["logp_acceptable"], answers["logp_unacceptable"]).sum()
    tokens = int((batch["labels"] != -100).sum())
    assert loss == pytest.approx(nats / tokens, rel=1e-4)


def test_sft_lowers_the_loss_on_what_it_is_taught(run_twice):
    _, outcome, _, _, _ = run_twice("sft", changes={"sft.steps": 12})
    assert outcome.log["step"].tolist() == list(range(1, 13))
    assert outcome.log["loss"].iloc[-3:].mean() < outcome.log["loss"].iloc[:3].mean()


def test_training_leaves_nothing_in_the_working_directory(prepare, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for run in ("sft", "rl"):
        trainer_of(prepare(run), monkeypatch).train()
    assert list(tmp_path.iterdir()) == []


# Data order


def test_training_sentences_are_drawn_by_the_seed(prepare):
    stage = prepare("sft")
    train = stage.corpus[stage.corpus["split"] == "train"]
    rows = training.training_rows(stage, 50)
    assert len(rows) == rows["sentence"].nunique() == 50
    assert set(rows["split"]) == {"train"}
    pd.testing.assert_frame_equal(rows, training.training_rows(stage, 50))
    others = training.training_rows(prepare("sft", seed=1), 50), training.training_rows(prepare("rl"), 50)
    for other in others:
        assert rows["sentence"].tolist() != other["sentence"].tolist()
    assert sorted(training.training_rows(stage, 400)["sentence"]) == sorted(train["sentence"])


def test_stages_and_seeds_have_distinct_random_numbers(prepare):
    seeds = [training.stage_seed(prepare(run, seed)) for run in ("sft", "rl") for seed in (0, 1, 10)]
    assert len(set(seeds)) == len(seeds)


# Runs repeat


@pytest.mark.parametrize("run", ["sft", "sft-rl"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(run_twice, run):
    _, first, weights, metrics, predictions = run_twice(run)
    _, again, same_weights, same_metrics, same_predictions = run_twice(run, again=1)
    pd.testing.assert_frame_equal(first.trajectory, again.trajectory, check_exact=True)
    assert torch.equal(weights, same_weights)
    assert metrics == same_metrics
    pd.testing.assert_frame_equal(predictions, same_predictions, check_exact=True)


def test_another_seed_gives_another_run(run_twice, prepare):
    for run in ("sft", "rl"):
        _, first, weights, metrics, _ = run_twice(run)
        _, other, other_weights, other_metrics, _ = run_twice(run, seed=1)
        assert not torch.equal(weights, other_weights)
        assert metrics["sft_loss"] != other_metrics["sft_loss"]
        assert first.trajectory["sft_loss"].iloc[0] == other.trajectory["sft_loss"].iloc[0]  # they share their start


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
    parent = runs.read_json(stage.references["parent"] / runs.METRICS)["evaluation"]["dev"]
    first, last = outcome.trajectory.iloc[0], outcome.trajectory.iloc[-1]
    assert first["step"] == 0
    assert last["step"] == outcome.training["steps"]
    assert first["kl_to_parent"] == pytest.approx(0, abs=1e-6)
    for name, value in parent.items():
        if name != "kl_to_parent":
            assert first[name] == pytest.approx(value, abs=1e-6), name
    assert last.drop("step").to_dict() == metrics


@pytest.mark.parametrize(
    ("steps", "points", "expected"),
    [(250, 6, [0, 50, 100, 150, 200, 250]), (3, 2, [0, 3]), (2, 6, [0, 1, 2]), (90, 4, [0, 30, 60, 90])],
)
def test_evaluation_steps_by_hand(steps, points, expected):
    assert training.evaluation_steps(steps, points) == expected


# RL: the reference, the shortcut and the gradient


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
    assert training.models.count_parameters(stage.policy)[0] == outcome.training["trained_parameters"]


def test_the_settings_of_the_objective_are_those_of_the_theory(prepare, monkeypatch):
    arguments = trainer_of(prepare("rl", changes={"rl.beta": 0.6}), monkeypatch).args
    assert arguments.loss_type == "dr_grpo"
    assert arguments.scale_rewards == "none"
    assert arguments.beta == pytest.approx(0.6 * 3 / 4)  # four answers per prompt
    assert arguments.use_bias_correction_kl  # otherwise the KL term's gradient is that of KL(reference || policy)
    assert arguments.num_iterations == arguments.gradient_accumulation_steps == arguments.steps_per_generation == 1
    assert arguments.temperature == 1
    group = trainer_of(prepare("rl", changes={"rl.normalisation": "group", "rl.beta": 0.6}), monkeypatch).args
    assert (group.loss_type, group.scale_rewards, group.beta) == ("dapo", "group", 0.6)


def test_scoring_distinct_answers_once_gives_the_same_numbers_and_gradients(prepare, monkeypatch):
    stage = prepare("rl")
    trainer = trainer_of(stage, monkeypatch)
    disturb(stage.policy)
    question = prompts.prompt_ids(stage.tokenizer, stage.settings.prompt, stage.corpus["sentence"][:2])
    width = max(map(len, question))
    pad, eos = stage.tokenizer.pad_token_id, stage.tokenizer.eos_token_id
    short, long = [300, eos, pad], [301, 302, eos]
    rows = [(0, long), (1, short), (0, long), (0, short), (1, short), (1, short), (1, long)]
    ids, mask = [], []
    for which, answer in rows:
        padding = width - len(question[which])
        ids.append([pad] * padding + question[which] + answer)
        mask.append([0] * padding + [1] * len(question[which]) + [1, 1, int(answer is long)])
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    weights = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(0)) * mask[:, -3:]

    def score(kind):
        logps, entropies, _ = kind._get_per_token_logps_and_entropies(
            trainer, stage.policy, ids, mask, 3, compute_entropy=True
        )
        stage.policy.zero_grad()
        (logps * weights).sum().backward()
        return logps.detach(), entropies.detach(), gradient(stage.policy)

    plain, distinct = score(GRPOTrainer), score(reinforcement.DistinctGRPOTrainer)
    for expected, found in zip(plain, distinct, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert plain[2].abs().max() > 1e-3
    calls = []
    monkeypatch.setattr(stage.policy.get_base_model(), "forward", recording(stage.policy.get_base_model(), calls))
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(stage.policy, ids, mask, 3)
    assert calls == [4]  # of seven rows, four differ


def recording(model, calls):
    """``model.forward`` that notes how many rows it is given."""
    forward = model.forward

    def recorded(*args, **kwargs):
        calls.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))
        return forward(*args, **kwargs)

    return recorded


def disturb(policy, size=0.13):
    """Move the policy away from its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if weight.requires_grad and "lora_B" in name:
                weight += size * torch.randn(weight.shape, generator=generator)


def gradient(policy):
    return torch.cat([w.grad.flatten() for w in policy.parameters() if w.requires_grad]).clone()


def exact_gradients(stage, questions, labels):
    """Gradients of E[r] and of KL(policy || start), by summing over all answers of one token."""
    answers = [stage.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("unacceptable", "acceptable")]
    assert [len(answer) for answer in answers] == [1, 1]
    reward, kl = torch.zeros(()), torch.zeros(())
    for question, label in zip(questions, labels, strict=True):
        ids = torch.tensor([question])
        logp = torch.log_softmax(stage.policy(ids).logits[0, -1], -1)
        with torch.no_grad(), stage.policy.disable_adapter():
            start = torch.log_softmax(stage.policy(ids).logits[0, -1], -1)
        r = -torch.ones(len(logp))
        r[answers[label][0]] = 1.0
        reward = reward + (logp.exp() * r).sum() / len(labels)
        kl = kl + (logp.exp() * (logp - start)).sum() / len(labels)
    assert 0.02 < kl.item() < 2  # far enough from the start for the KL term to matter
    gradients = []
    for value in (reward, kl):
        stage.policy.zero_grad()
        value.backward(retain_graph=True)
        gradients.append(gradient(stage.policy))
    stage.policy.zero_grad()
    return gradients


class Recorder(TrainerCallback):
    """Moves the policy away from its reference at the start, then notes the gradient of every step."""

    def __init__(self, policy):
        self.policy, self.gradients = policy, []

    def on_train_begin(self, args, state, control, **kwargs):
        disturb(self.policy)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(gradient(self.policy))


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_the_rl_gradient_is_that_of_the_regularised_objective(prepare, monkeypatch, beta):
    """For answers of one token all answers can be summed over, so the exact gradient is known.

    With G answers per prompt the group's mean shrinks the gradient by (G-1)/G, and beta is scaled to match: the mean
    gradient must be -(G-1)/G times that of E[r] - beta KL, with and without the KL term. Fifteen thousand sampled
    answers know the factor to 4 % (over twelve seeds); the tolerance is four times that, and tells 3/4 from 1.
    """
    group, copies, steps = 4, 60, 8
    changes = {
        "rl.beta": beta,
        "rl.answers_per_prompt": group,
        "rl.prompts_per_step": 8 * copies,
        "rl.steps": steps,
        "prompt.max_new_tokens": 1,
        "rl.learning_rate": 1e-12,  # the weights stay where they are
    }
    stage = prepare("rl", changes=changes)
    train = stage.corpus[stage.corpus["split"] == "train"].iloc[:8]
    stage = stage._replace(corpus=pd.concat([train] * copies * steps, ignore_index=True))
    recorder = Recorder(stage.policy)
    trainer = trainer_of(stage, monkeypatch, recorder)
    trainer.args.max_grad_norm = 1e9  # clipping would change the length of each step's gradient
    trainer.train()
    assert len(recorder.gradients) == steps
    found = torch.stack(recorder.gradients).mean(0)
    questions = prompts.prompt_ids(stage.tokenizer, stage.settings.prompt, train["sentence"])
    of_reward, of_kl = exact_gradients(stage, questions, train["label"])
    exact = -(of_reward - beta * of_kl)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.99
    assert (found @ exact / (exact @ exact)).item() == pytest.approx((group - 1) / group, rel=0.16)


# What must stop a run


def callback_at(step, tolerance=None, max_steps=10):
    state = type("State", (), {"global_step": step, "max_steps": max_steps})
    callback = StageCallback([], lambda: {}, lambda start: None, tolerance)
    return lambda **logs: callback.on_log(None, state, None, logs=logs)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(name, value):
    class Trainer(training.FiniteSteps):
        state = type("State", (), {"global_step": 7})
        batch = "Is it?"

    with pytest.raises(FloatingPointError, match=f"{name} is {value} at step 7.*'Is it.'.*lower the learning rate"):
        Trainer().log({"loss": 0.1, "grad_norm": 0.2} | {name: value})


def test_sampling_from_weights_that_are_no_numbers_names_step_and_batch(prepare, monkeypatch):
    stage = prepare("rl")
    trainer = trainer_of(stage, monkeypatch)
    with torch.no_grad():
        next(weight for weight in stage.policy.parameters() if weight.requires_grad).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="a probability is not finite at step 1, in the batch .*acceptable"):
        trainer.train()


def test_a_run_that_diverges_stops(prepare):
    stage = prepare("sft", changes={"sft.learning_rate": 1e30, "sft.warmup_share": 0.0})
    with pytest.raises(
        FloatingPointError, match="at step [12], in the batch that begins with .*acceptable.*: training diverged"
    ):
        training.train_sft(stage)


def test_finite_numbers_are_logged(capsys):
    callback_at(4)(loss=0.5, grad_norm=1.0, reward=0.25)
    printed = capsys.readouterr().out
    assert "step     4/10  loss 0.5000  reward +0.250" in printed
    callback_at(5)(loss=0.5, grad_norm=1.0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("variable", "quiet"), [("1", True), ("", False)])
def test_the_bar_is_for_those_who_look_on(monkeypatch, variable, quiet):
    from tqdm.notebook import tqdm_notebook

    monkeypatch.setattr(training, "tqdm", tqdm_notebook)
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


# Preparing a stage


def test_a_run_of_another_stage_is_refused(tiny_base):
    with pytest.raises(ValueError, match="'rl' is a stage 'rl', not 'sft'"):
        training.prepare_stage(tiny_base, "rl", 0, expected="sft")


def test_a_parent_that_has_not_been_run_is_named(tiny_base):
    with pytest.raises(FileNotFoundError, match=r"Run 'sft-rl' needs the finished run .*seed99.sft"):
        training.prepare_stage(tiny_base, "sft-rl", 99, expected="rl")


def test_data_that_changed_since_the_data_run_are_refused(tiny_base, monkeypatch, tmp_path):
    root = tmp_path / "tiny"
    root.mkdir()
    for folder in ("data", "base"):
        (root / folder).mkdir()
        for path in (runs.study_folder(tiny_base) / folder).iterdir():
            if path.is_file():
                (root / folder / path.name).write_bytes(path.read_bytes())
    assert len(training.load_checked_corpus(tiny_base, root)) == 460
    with (root / "data" / "in_domain_dev.tsv").open("a") as lines:
        lines.write("x\t1\t\tOne more.\n")
    with pytest.raises(ValueError, match="in_domain_dev.tsv has sha256 .* run 01_data again"):
        training.load_checked_corpus(tiny_base, root)


def test_policies_are_measured_on_dev_and_a_part_of_train(prepare):
    stage = prepare("sft")
    tables = training.evaluation_tables(stage.corpus, stage.settings.evaluation)
    assert {split: len(table) for split, table in tables.items()} == {"dev": 60, "train": 40}
    assert set(tables["train"]["split"]) == {"train"}


def test_another_run_in_the_plan_changes_no_seed(prepare):
    stage = prepare("rl")
    profile = stage.study.profile
    extra = profile.runs[0].model_copy(update={"name": "extra"})
    longer = profile.model_copy(update={"runs": [extra, *profile.runs]})
    more = stage._replace(study=stage.study.model_copy(update={"profile": longer}))
    assert training.stage_seed(more) == training.stage_seed(stage)


# Passes: memory is bounded, the gradient is the same


def weights_after(stage, train):
    train(stage)
    return torch.cat([weight.detach().flatten() for weight in stage.policy.parameters() if weight.requires_grad])


@pytest.mark.parametrize("normalisation", ["none", "group"])
def test_rl_in_several_passes_is_rl_in_one(prepare, normalisation):
    """The same sums in another order: the same answers are sampled, so gradients must agree to rounding."""
    found = []
    for rows in (256, 4):  # four questions: sampled from together in both cases
        stage = prepare("rl", changes={"rl.rows_per_pass": rows, "rl.normalisation": normalisation, "rl.steps": 1})
        recorder = Recorder(stage.policy)
        with pytest.MonkeyPatch.context() as patch:
            trainer = trainer_of(stage, patch, recorder)
        trainer.train()
        found.append(recorder.gradients[0])
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_sft_in_several_passes_is_sft_in_one(prepare):
    found = []
    for rows in (16, 4):
        stage = prepare("sft", changes={"sft.rows_per_pass": rows, "sft.steps": 1})
        recorder = Recorder(stage.policy)
        with pytest.MonkeyPatch.context() as patch:
            trainer = trainer_of(stage, patch, recorder)
        trainer.train()
        found.append(recorder.gradients[0])
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_no_pass_holds_more_distinct_rows_than_allowed(prepare, monkeypatch):
    stage = prepare("rl", changes={"rl.rows_per_pass": 3})
    trainer = trainer_of(stage, monkeypatch)
    prompts_, answers = torch.arange(8).repeat_interleave(2)[:, None], torch.arange(16)[:, None] % 4
    inputs = {"prompt_ids": prompts_, "completion_ids": answers, "num_items_in_batch": torch.tensor(16)}
    parts = trainer.passes(inputs)
    assert [len(part["prompt_ids"].unique()) <= 3 for part, _ in parts] == [True] * len(parts)
    assert sum(len(part["prompt_ids"]) for part, _ in parts) == 16
    assert sum(weight for _, weight in parts) == pytest.approx(1)
    assert all(part["num_items_in_batch"] == 16 for part, _ in parts)


# Interruption


class Interrupt(TrainerCallback):
    """Ctrl-C right after a step, as it reaches a stage in the middle of training."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("run", "train"),
    [
        ("sft", training.train_sft),
        ("sft-rl", reinforcement.train_rl),
        ("joint-m0.5", reinforcement.train_joint),
        ("reward-model", training.train_reward),
    ],
)
def test_an_interrupted_stage_ends_as_if_nothing_had_happened(tiny_sft, prepare, monkeypatch, capsys, run, train):
    steps = {f"{section}.steps": 6 for section in ("sft", "rl", "joint", "reward")}
    changes = steps | {"evaluation.points": 4}  # measured and saved at steps 0, 2, 4 and 6
    whole = prepare(run, changes=changes)
    expected = train(whole)
    folder = runs.checkpoints_folder(whole.root, whole.run, whole.seed)
    shutil.rmtree(folder)

    original = training.run_trainer

    def interrupted(stage, build, *rest, **more):
        return original(stage, lambda c: with_callback(build(c), Interrupt(5)), *rest, **more)

    for module in (training, reinforcement):
        monkeypatch.setattr(module, "run_trainer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(prepare(run, changes=changes))
    monkeypatch.undo()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (folder / "checkpoint-4" / runs.MEASURED).unlink()  # as if it had been interrupted while it was written

    capsys.readouterr()
    again = prepare(run, changes=changes)
    found = train(again)
    assert "going on from checkpoint 2 of 6" in capsys.readouterr().out
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


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path):
    folder = tmp_path / "sft.checkpoints"
    assert runs.last_checkpoint(folder, {"rank": 16}) is None
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / runs.MEASURED).write_text("{}")
    (folder / "checkpoint-10").mkdir()
    assert runs.last_checkpoint(folder, {"rank": 16}) == folder / "checkpoint-5"
    assert not (folder / "checkpoint-10").exists()
    assert runs.last_checkpoint(folder, {"rank": 8}) is None
    assert not (folder / "checkpoint-5").exists()


# RL that cannot learn


def test_rl_refuses_to_start_where_almost_nothing_is_rewarded(prepare):
    stage = prepare("rl", changes={"rl.least_rewarded": 0.99})
    with pytest.raises(
        RuntimeError, match=r"RL cannot start: .*rl.reward=strict.*prompt.template.*rl.least_rewarded=0"
    ):
        reinforcement.train_rl(stage)


def test_the_share_of_rewarded_answers_is_read_as_training_reads_them(capsys):
    rl = load_study("nano").profile.rl
    start = {"reward_sampled_strict": -0.98, "reward_sampled": 0.0}
    with pytest.raises(RuntimeError, match="1.0% of the sampled answers"):
        reinforcement.check_rewarded(rl, start)
    reinforcement.check_rewarded(rl.model_copy(update={"reward": "robust"}), start)
    reinforcement.check_rewarded(rl.model_copy(update={"least_rewarded": 0.0}), start)
    assert "50.0% of the sampled answers earn +1 (rl.reward=robust)" in capsys.readouterr().out


def test_steps_without_any_reward_to_learn_from_are_reported_once(capsys):
    log = callback_at(4, max_steps=1000)
    for _ in range(training.SILENT_STEPS - 1):
        log(loss=0.0, reward=-1.0, frac_reward_zero_std=1.0)
    assert capsys.readouterr().out == ""
    for _ in range(5):
        log(loss=0.0, reward=-1.0, frac_reward_zero_std=1.0)
    assert capsys.readouterr().out.count("no reward to learn from") == 1
    log(loss=0.0, reward=0.0, frac_reward_zero_std=0.5)
    for _ in range(training.SILENT_STEPS):
        log(loss=0.0, reward=-1.0, frac_reward_zero_std=1.0)
    assert capsys.readouterr().out.count("no reward to learn from") == 1


def test_silent_groups_are_counted_in_the_runs_result(run_twice):
    _, outcome, _, _, _ = run_twice("rl")
    share = outcome.training["silent_group_share"]
    assert share == pytest.approx(outcome.log["frac_reward_zero_std"].mean(), abs=1e-4)


# Memory


def test_running_out_of_gpu_memory_names_the_peak_and_the_setting(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2**30)
    card = type("Card", (), {"total_memory": 8 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with (
        pytest.raises(RuntimeError, match=r"7.0 of 8.0 GiB.*lower rl.rows_per_pass or evaluation.batch_size") as caught,
        training.memory_explained("rl.rows_per_pass", "evaluation.batch_size"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "\n" not in str(caught.value)


def test_only_answers_are_projected_onto_the_vocabulary(prepare, monkeypatch):
    """trl would otherwise compute logits of every prompt token on a CPU, most of the work with a real vocabulary."""
    stage, rows = prepare("sft", changes={"sft.steps": 1}), []
    original = trl.trainer.utils._ChunkedLogProbFunction

    class Spy:
        @staticmethod
        def apply(hidden, *rest):
            rows.append(len(hidden))
            return original.apply(hidden, *rest)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Spy)
    trainer_of(stage, monkeypatch).train()
    answers = stage.settings.sft.batch_size * 2  # one token and its end of turn each
    assert rows == [answers]
