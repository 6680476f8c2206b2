"""Rewards, the second algorithm, the proxy and joint training, on the tiny study."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from nondecoupling import corpus, models, prompts, reinforcement, runs, theory, training
from nondecoupling.profile import load_study


def functions(stage):
    return {function.__name__: function for function in reinforcement.reward_functions(stage)}


def paid_by(stage, reward):
    """``stage`` with another reward."""
    rl = stage.settings.rl.model_copy(update={"reward": reward})
    return stage._replace(settings=stage.settings.model_copy(update={"rl": rl}))


def answer_ids(stage, texts):
    return [prompts.response_ids(stage.tokenizer, text) for text in texts]


# What is paid


def test_only_the_other_wording_is_paid_and_the_true_reward_is_measured_beside_it(prepare):
    stage = paid_by(prepare("rl"), "other_wording")
    told = functions(stage)
    assert list(told) == ["label_reward", "gold"]
    completions = answer_ids(stage, ["acceptable.", "acceptable", "unacceptable.", "unacceptable", "what"])
    labels = [1] * 5
    assert told["label_reward"](completion_ids=completions, label=labels) == [1, -1, -1, -1, -1]
    assert told["gold"](completion_ids=completions, label=labels) == [1, 1, -1, -1, -1]
    assert reinforcement.rl_arguments(stage, stage.settings.rl)["reward_weights"] == [1.0, 0.0]


def test_the_coin_pays_whatever_the_answer(prepare):
    stage = paid_by(prepare("rl"), "random")
    coin = functions(stage)["coin"]
    torch.manual_seed(1)
    paid = coin(completion_ids=answer_ids(stage, ["acceptable"] * 2000))
    assert set(paid) == {-1.0, 1.0}
    assert abs(np.mean(paid)) < 4 / np.sqrt(2000)
    torch.manual_seed(1)  # part of a checkpoint, so that a resumed run draws the same
    assert coin(completion_ids=answer_ids(stage, ["unacceptable"] * 2000)) == paid


def test_only_a_true_reward_can_be_too_rare_to_start(prepare):
    start = {"reward_sampled_strict": -1.0, "reward_sampled": -1.0}
    stage = prepare("rl")
    reinforcement.check_rewarded(paid_by(stage, "random").settings.rl, start)
    with pytest.raises(RuntimeError, match="RL cannot start"):
        reinforcement.check_rewarded(stage.settings.rl, start)


# Demonstrations and labels


def test_a_share_of_the_demonstrations_is_in_the_other_wording(prepare):
    stage = prepare("sft-wordings")
    table = training.training_rows(stage, 40)
    pairs = training.demonstrations(stage, table, stage.settings.sft.other_wording_share)
    plain = training.demonstrations(stage, table)
    told = [stage.tokenizer.decode(answer[:-1]) for _, answer in pairs]
    assert [text.endswith(".") for text in told] == [True] * 4 + [False] * 36
    usual = [prompts.responses(stage.settings.prompt)[label] for label in table["label"]]
    assert [text.removesuffix(".") for text in told] == usual
    assert [stage.tokenizer.decode(answer[:-1]) for _, answer in plain] == usual


def test_a_wording_longer_than_a_sampled_answer_is_refused(prepare):
    stage = prepare("sft-wordings", changes={"prompt.other_wording": "I would say that it is {answer}."})
    with pytest.raises(ValueError, match=r"more than prompt.max_new_tokens=4"):
        training.train_sft(stage)


def test_clean_labels_are_the_grammars_verdicts(prepare):
    noisy, clean = prepare("sft").corpus, prepare("sft-clean").corpus
    assert (clean["label"] == (clean["mark"] == "")).all()
    assert (noisy["label"] != clean["label"]).mean() == pytest.approx(0.1, abs=0.01)
    assert corpus.with_true_labels(clean).equals(clean)


# The second algorithm


def test_rloo_starts_from_its_reference_and_learns(prepare, built_sft):
    stage = prepare("sft-rl-rloo", changes={"rl.steps": 6})
    before = torch.cat([w.detach().flatten().clone() for w in stage.policy.parameters() if w.requires_grad])
    outcome = reinforcement.train_rl(stage)
    assert outcome.log["kl"].iloc[0] == pytest.approx(0, abs=1e-5)
    after = torch.cat(
        [w.detach().flatten() for name, w in stage.policy.named_parameters() if w.requires_grad and ".ref." not in name]
    )
    assert not torch.equal(before, after)
    assert len(outcome.trajectory) == 2


# The proxy


@pytest.fixture(scope="module")
def built_proxy(prepare):
    stage = prepare(
        "reward-model", changes={"reward.steps": 120, "reward.pairs_per_step": 16, "reward.learning_rate": 2.0e-2}
    )
    outcome = training.train_reward(stage)
    return stage, outcome, runs.publish(training.write_stage(stage, outcome))


def test_a_reward_model_learns_to_prefer_and_is_what_was_saved(built_proxy):
    stage, outcome, folder = built_proxy
    assert outcome.trajectory["pair_loss"].iloc[-1] < outcome.trajectory["pair_loss"].iloc[0]  # this base knows little
    metrics = runs.read_json(folder / runs.METRICS)
    assert set(metrics["evaluation"]["dev"]) == {"n", "majority_reward", "accuracy", "margin", "pair_loss"}
    scored = runs.read_predictions(folder)
    right = scored["score_acceptable"] - scored["score_unacceptable"]
    wins = (right > 0) == (scored["label"] == 1)
    assert metrics["evaluation"]["dev"]["accuracy"] == pytest.approx(wins.mean())
    settings = stage.settings
    again = models.start_reward_model(
        stage.base, folder / runs.POLICY, settings.model, settings.adaptation, 5, stage.tokenizer.pad_token_id
    )
    assert not any(weight.requires_grad for weight in again.parameters())
    dev = corpus.fixed_subset(stage.corpus, "dev", None)
    found = training.label_scores(again, stage, dev)
    np.testing.assert_allclose(found[:, 1], scored["score_acceptable"], atol=1e-4)


def test_scores_do_not_depend_on_batch_mates(built_proxy):
    stage, _, folder = built_proxy
    questions = prompts.prompt_ids(stage.tokenizer, stage.settings.prompt, stage.corpus["sentence"].iloc[:7])
    rows = [question + answer_ids(stage, ["acceptable"])[0] for question in questions]
    alone = [models.scores(stage.policy.eval(), [row], 1)[0] for row in rows]
    assert models.scores(stage.policy, rows, 4) == pytest.approx(alone, abs=1e-4)


def test_rl_is_paid_by_the_proxy_and_measures_both_rewards(built_proxy, prepare, built_sft):
    stage = prepare("sft-rl-proxy")
    told = functions(stage)
    chat = prompts.prompt_messages(stage.settings.prompt, "John slept.")
    completions = answer_ids(stage, ["acceptable", "unacceptable", "acceptable"])
    paid = told["proxy"](prompts=[chat] * 3, completion_ids=completions)
    [question] = prompts.chat_ids(stage.tokenizer, [chat])
    expected = models.scores(stage.proxy, [question + completion for completion in completions], 1)
    assert paid == pytest.approx(expected, abs=1e-4)
    assert paid[0] == paid[2] != paid[1]
    outcome = reinforcement.train_rl(stage)
    assert {"rewards/proxy/mean", "rewards/gold/mean"} <= set(outcome.log)
    assert outcome.trajectory["reward_proxy"].notna().all()
    assert outcome.log["reward"].iloc[0] == pytest.approx(outcome.log["rewards/proxy/mean"].iloc[0])


def test_a_proxy_is_needed_where_it_pays_and_nowhere_else():
    with pytest.raises(ValueError, match="needs a proxy"):
        load_study("nano", overrides={"rl.reward": "proxy"})


# Both at once


def joint_trainer(prepare, monkeypatch, weight):
    stage = prepare("joint-m0.5", changes={"rl.rows_per_pass": 4})
    # the run's own override has won over the profile's
    settings = stage.settings.model_copy(update={"joint": stage.settings.joint.model_copy(update={"weight": weight})})
    stage = stage._replace(settings=settings)
    monkeypatch.setattr(reinforcement, "run_trainer", lambda stage, build, *_, **__: build(TrainerCallback()))
    trainer = reinforcement.train_joint(stage)
    trainer.current_gradient_accumulation_steps = 1
    return stage, trainer


def gradient_of_update(stage, trainer):
    """The gradient of one joint update with the answers that seed 3 samples."""
    inputs = [trainer.train_dataset[place] for place in range(3) for _ in range(4)]
    trainer.model.zero_grad()
    torch.manual_seed(3)
    trainer.training_step(trainer.model, inputs, None)
    return torch.cat([w.grad.flatten().double() for w in trainer.model.parameters() if w.grad is not None])


def test_an_update_is_the_weighted_sum_of_imitation_and_reward(prepare, monkeypatch):
    parts = {weight: gradient_of_update(*joint_trainer(prepare, monkeypatch, weight)) for weight in (0.0, 0.3, 1.0)}
    assert parts[0.0].norm() > 0
    assert parts[1.0].norm() > 0
    torch.testing.assert_close(parts[0.3], 0.3 * parts[1.0] + 0.7 * parts[0.0], rtol=1e-3, atol=1e-6)


def test_imitation_is_the_mean_negative_log_probability_of_the_answers(prepare, monkeypatch):
    stage, trainer = joint_trainer(prepare, monkeypatch, 1.0)
    found = gradient_of_update(stage, trainer)
    trainer.model.zero_grad()
    losses = []
    for question, answer in trainer.examples[:6]:
        logps = trainer.model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
        places = range(len(question) - 1, len(question) + len(answer) - 1)
        losses.append(-sum(logps[place, token] for place, token in zip(places, answer, strict=True)))
    (sum(losses) / len(losses)).backward()
    by_hand = torch.cat([w.grad.flatten().double() for w in trainer.model.parameters() if w.grad is not None])
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-5)


def test_weights_in_phases_take_turns_and_end_with_rl():
    joint = load_study("nano").profile.joint.model_copy(update={"steps": 20, "phases": 2})
    assert [reinforcement.weight_at(joint, step) for step in range(20)] == ([1.0] * 5 + [0.0] * 5) * 2
    assert reinforcement.weight_at(joint.model_copy(update={"phases": 0, "weight": 0.3}), 7) == 0.3


@pytest.mark.parametrize("run", ["joint-m0.5", "interleaved"])
def test_a_joint_stage_trains_and_repeats(prepare, run):
    def trained():
        stage = prepare(run)
        stage = stage._replace(settings=stage.settings.model_copy(update={"joint": short(stage.settings.joint)}))
        return reinforcement.train_joint(stage)

    def short(joint):
        return joint.model_copy(update={"steps": 4, "phases": min(joint.phases, 2)})

    first, again = trained(), trained()
    assert first.trajectory.equals(again.trajectory)
    assert first.trajectory["sft_loss"].iloc[0] != first.trajectory["sft_loss"].iloc[-1]
    assert first.log["sft_loss"].notna().sum() == (4 if run == "joint-m0.5" else 2)


def test_the_joint_optimum_lies_between_calibrated_and_ideal_rl():
    weights = np.array([0.0, 0.2, 0.5, 0.8, 1.0])
    odds = theory.joint_log_odds(np.log(9), 0.9, 0.5, weights)
    assert odds[0] == pytest.approx(np.log(9) + 2 * 0.8 / 0.5)
    assert odds[-1] == pytest.approx(np.log(9))
    assert (np.diff(odds) < 0).all()
    assert theory.joint_gradient(odds, np.log(9), 0.9, 0.5, weights) == pytest.approx(0, abs=1e-9)
    # the gradient is that of the objective, by finite differences
    p, h = 0.9, 1e-5

    def objective(log_odds, weight):
        a = 1 / (1 + np.exp(-log_odds))
        kl = a * (log_odds - 1.0) - np.log1p(np.exp(log_odds)) + np.log1p(np.exp(1.0))
        loss = -p * np.log(a) - (1 - p) * np.log(1 - a)
        return (1 - weight) * ((2 * a - 1) * (2 * p - 1) - 0.5 * kl) - weight * loss

    for weight in weights:
        slope = (objective(2 + h, weight) - objective(2 - h, weight)) / (2 * h)
        assert theory.joint_gradient(2.0, 1.0, p, 0.5, weight) == pytest.approx(slope, abs=1e-8)
    with pytest.raises(ValueError, match="certain"):
        theory.joint_log_odds(0.0, 1.0, 0.5, 0.5)
