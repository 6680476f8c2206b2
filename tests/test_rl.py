"""RL on the tiny study: what is paid, that the gradient is the theory's, the second algorithm, the proxy, and joint."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from nondecoupling.analysis import theory
from nondecoupling.study import folders
from nondecoupling.study.study import load_study
from nondecoupling.task import corpus, prompts
from nondecoupling.training import models, reward_model, rl
from nondecoupling.training.joint import weight_at
from nondecoupling.training.stage import publish_stage
from trainers import Recorder, disturb, gradient, train, trained_weights, trainer_of


def functions(stage):
    return {function.__name__: function for function in rl.reward_functions(stage)}


def answer_ids(stage, texts):
    return [prompts.response_ids(stage.tokenizer, text) for text in texts]


# What is paid


def test_only_the_other_wording_is_paid_and_the_true_reward_is_measured_beside_it(prepare):
    stage = prepare("rl", changes={"rl.reward": "other_wording"})
    told = functions(stage)
    assert list(told) == ["label_reward", "gold", "off_format"]
    completions = answer_ids(stage, ["acceptable.", "acceptable", "unacceptable.", "unacceptable", "what"])
    labels = [1] * 5
    assert told["label_reward"](completion_ids=completions, label=labels) == [1, -1, -1, -1, -1]
    assert told["gold"](completion_ids=completions, label=labels) == [1, 1, -1, -1, -1]
    assert told["off_format"](completion_ids=completions, label=labels) == [0, 1, 0, 1, 1]
    assert rl.rl_arguments(stage, stage.settings.rl)["reward_weights"] == [1.0, 0.0, 0.0]


def test_a_label_that_a_coin_drew_is_paid_and_the_true_reward_is_measured_beside_it(prepare, built_sft):
    stage = prepare("sft-rl-random")
    told = functions(stage)
    assert list(told) == ["drawn", "gold", "off_format"]
    completions = answer_ids(stage, ["acceptable", "acceptable", "unacceptable", "unacceptable", "what"])
    known = {"completion_ids": completions, "label": [1] * 5, "drawn_label": [1, 0, 1, 0, 0]}
    assert told["drawn"](**known) == [1, -1, -1, 1, -1]
    assert told["gold"](**known) == [1, 1, -1, -1, -1]
    assert rl.rl_arguments(stage, stage.settings.rl)["reward_weights"] == [1.0, 0.0, 0.0]


def test_the_coin_is_thrown_once_for_each_sentence_and_knows_nothing_of_its_label(prepare, built_sft):
    stage = prepare("sft-rl-random")
    questions = rl.rl_questions(stage, 400).to_pandas()
    drawn, chats = questions["drawn_label"], questions["prompt"].map(lambda chat: chat[0]["content"])
    assert len(chats) == chats.nunique() == 400
    assert set(drawn) == {0, 1}
    assert abs(drawn.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)
    assert abs(np.corrcoef(drawn, questions["label"])[0, 1]) < 4 / np.sqrt(400)
    pd.testing.assert_series_equal(drawn, rl.rl_questions(stage, 400).to_pandas()["drawn_label"])
    other = rl.rl_questions(stage._replace(seed=1), 400).to_pandas()
    assert drawn.tolist() != other["drawn_label"].tolist()
    by_sentence = pd.Series(drawn.to_numpy(), chats)
    others = pd.Series(other["drawn_label"].to_numpy(), other["prompt"].map(lambda chat: chat[0]["content"]))
    assert 0.3 < (by_sentence == others[by_sentence.index]).mean() < 0.7  # another seed's coin on the same sentences


def test_every_answer_to_a_sentence_is_paid_for_the_same_label_in_every_epoch(prepare, built_sft, monkeypatch):
    """Four sentences, two of them a step."""
    changes = {"rl.steps": 6, "rl.prompts_per_step": 2}
    stage = prepare("sft-rl-random", changes=changes)
    train_rows = stage.corpus[stage.corpus["split"] == "train"].iloc[:4]
    seen, reward_functions = [], rl.reward_functions

    def noted(stage):
        drawn, gold, off_format = reward_functions(stage)

        def recording(prompts, drawn_label, **more):
            seen.extend((chat[-1]["content"], label) for chat, label in zip(prompts, drawn_label, strict=True))
            return drawn(drawn_label=drawn_label, **more)

        return [recording, gold]

    monkeypatch.setattr(rl, "reward_functions", noted)
    outcome = train(stage._replace(corpus=pd.concat([train_rows, stage.corpus[stage.corpus["split"] == "dev"]])))
    labels = pd.DataFrame(seen, columns=["sentence", "label"]).groupby("sentence")["label"]
    assert labels.size().tolist() == [3 * stage.settings.rl.answers_per_prompt] * 4  # three epochs
    assert (labels.nunique() == 1).all()
    assert outcome.log["rewards/gold/mean"].between(-1, 1).all()


# What cannot learn is not begun


def test_rl_refuses_to_start_where_almost_nothing_is_rewarded(prepare):
    with pytest.raises(
        RuntimeError, match=r"RL cannot start: .*rl.reward=strict.*prompt.template.*rl.least_rewarded=0"
    ):
        train(prepare("rl", changes={"rl.least_rewarded": 0.99}))


def test_the_share_of_rewarded_answers_is_read_as_training_reads_them(capsys):
    settings = load_study("tiny").profile.rl
    start = {"reward_sampled_strict": -0.98, "reward_sampled": 0.0}
    with pytest.raises(RuntimeError, match="1.0% of the sampled answers"):
        rl.check_rewarded(settings, start)
    rl.check_rewarded(settings.model_copy(update={"reward": "robust"}), start)
    rl.check_rewarded(settings.model_copy(update={"least_rewarded": 0.0}), start)
    assert "50.0% of the sampled answers earn +1 (rl.reward=robust)" in capsys.readouterr().out
    rl.check_rewarded(settings.model_copy(update={"reward": "random"}), start)  # no true reward: judged by nobody
    assert not capsys.readouterr().out


# The objective


def test_the_settings_of_the_objective_are_those_of_the_theory(prepare):
    arguments = trainer_of(prepare("rl", changes={"rl.beta": 0.6})).args
    assert arguments.loss_type == "dr_grpo"
    assert arguments.scale_rewards == "none"
    assert arguments.beta == pytest.approx(0.6 * 3 / 4)  # four answers per prompt
    assert arguments.use_bias_correction_kl  # otherwise the KL term's gradient is that of KL(reference || policy)
    assert arguments.num_iterations == arguments.gradient_accumulation_steps == arguments.steps_per_generation == 1
    assert arguments.temperature == 1
    group = trainer_of(prepare("rl", changes={"rl.normalisation": "group", "rl.beta": 0.6})).args
    assert (group.loss_type, group.scale_rewards, group.beta) == ("dapo", "group", 0.6)


def test_scoring_distinct_answers_once_gives_the_same_numbers_and_gradients(prepare, monkeypatch):
    stage = prepare("rl")
    trainer = trainer_of(stage)
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
        counted = mask[:, -3:]  # of what is no answer any more there is no number
        return logps.detach() * counted, entropies.detach() * counted, gradient(stage.policy)

    plain, distinct = score(GRPOTrainer), score(rl.DistinctGRPOTrainer)
    for expected, found in zip(plain, distinct, strict=True):
        largest = max(1.0, float(expected.abs().max()))  # single precision rounds a sum by its largest terms
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)
    assert plain[2].abs().max() > 1e-3
    calls = []
    monkeypatch.setattr(stage.policy.get_base_model(), "forward", recording(stage.policy.get_base_model(), calls))
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(stage.policy, ids, mask, 3)
    assert calls == [1, 2, 4]  # the common start, two questions, and of seven answers the four that differ


def recording(model, calls):
    """``model.forward`` that notes how many rows it is given."""
    forward = model.forward

    def recorded(*args, **kwargs):
        calls.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))
        return forward(*args, **kwargs)

    return recorded


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
    gradients = []
    for value in (reward, kl):
        stage.policy.zero_grad()
        value.backward(retain_graph=True)
        gradients.append(gradient(stage.policy))
    stage.policy.zero_grad()
    return gradients


def test_an_rl_step_follows_the_gradients_of_reward_and_divergence(prepare):
    """The whole path, from sampling to the adapter's gradient; `test_oracle` proves trl's part without sampling.

    Answers have one token, so that the exact gradients of E[r] and of KL are known. The step must be (G-1)/G times
    that of beta KL - E[r], and with two answers per prompt that factor is 1/2. Eight steps that move nothing draw
    25,600 answers; the tolerances tell 1/2 from 1.
    """
    group, copies, beta = 2, 200, 2.0
    stage = prepare("rl", changes={"rl.beta": beta, "rl.answers_per_prompt": group, "rl.steps": 8})
    many = stage.settings.rl.model_copy(update={"prompts_per_step": 8 * copies})  # of the same eight sentences
    cut = stage.settings.prompt.model_copy(update={"max_new_tokens": 1})
    stage = stage._replace(settings=stage.settings.model_copy(update={"rl": many, "prompt": cut}))
    corpus = stage.corpus[(stage.corpus["split"] == "train") & (stage.corpus["label"] == 1)].iloc[:8]
    stage = stage._replace(corpus=pd.concat([corpus] * copies, ignore_index=True))
    questions = prompts.prompt_ids(stage.tokenizer, stage.settings.prompt, corpus["sentence"])
    for size, draw in product((0.17, 0.19, 0.21, 0.23), range(25)):
        # A start at which one gradient cannot stand for the other, and both count.
        disturb(stage.policy, size, draw)
        of_reward, of_kl = exact_gradients(stage, questions, corpus["label"])
        disturb(stage.policy, -size, draw)  # back: the trainer takes what it is given as the reference
        apart = abs(torch.cosine_similarity(of_reward, of_kl, dim=0)) < 0.6
        if apart and 0.1 < of_kl.norm() / of_reward.norm() < 5:
            break
    else:
        pytest.fail("no start at which the two gradients can be told apart")
    known = torch.stack([of_reward, of_kl], 1)
    recorder = Recorder(stage.policy, size, draw)
    trainer = trainer_of(stage, recorder)
    trainer.args.max_grad_norm = 1e9  # clipping would change the gradient's length
    trainer.args.learning_rate = 0
    trainer.train()
    found = torch.stack(recorder.gradients).mean(0)
    coefficients = torch.linalg.lstsq(known, found[:, None]).solution.flatten()
    shrunk = (group - 1) / group
    assert coefficients[0] == pytest.approx(-shrunk, rel=0.25)
    assert coefficients[1] == pytest.approx(shrunk * beta, rel=0.6)
    assert torch.cosine_similarity(known @ coefficients, found, dim=0) > 0.97


def test_no_pass_holds_more_distinct_rows_than_allowed(prepare):
    """Eight distinct (prompt, answer) rows, four answers to each of two prompts, each row twice."""
    trainer = trainer_of(prepare("rl"))
    asked, answers = torch.arange(16)[:, None] // 4 % 2, torch.arange(16)[:, None] % 4
    inputs = {"prompt_ids": asked, "completion_ids": answers, "num_items_in_batch": torch.tensor(16)}
    for limit, expected in ((3, [3, 3, 2]), (4, [4, 4]), (7, [7, 1]), (8, [8])):
        trainer.rows_per_pass = limit
        parts = trainer.passes(inputs)
        rows = [torch.cat([part["prompt_ids"], part["completion_ids"]], 1) for part, _ in parts]
        assert [len(part.unique(dim=0)) for part in rows] == expected
        assert [len(part) for part in rows] == [2 * count for count in expected]  # equal rows stay together
        assert [weight for _, weight in parts] == pytest.approx([count / 8 for count in expected])
        assert all(part["num_items_in_batch"] == 16 for part, _ in parts)


@pytest.mark.parametrize(
    ("algorithm", "trainer", "name"),
    [
        *(("grpo", GRPOTrainer, name) for name in rl.DistinctGRPOTrainer.private),
        *(("rloo", RLOOTrainer, name) for name in rl.DistinctRLOOTrainer.private),
    ],
)
def test_a_trl_that_lost_a_method_that_is_overridden_here_is_refused(prepare, monkeypatch, algorithm, trainer, name):
    stage = prepare("rl", changes={"rl.algorithm": algorithm})
    monkeypatch.delattr(trainer, name)
    with pytest.raises(AttributeError, match=f"trl's trainers have no {name} any more"):
        trainer_of(stage)


# The second algorithm


def test_rloo_starts_from_its_reference_and_learns(prepare, built_sft):
    stage = prepare("sft-rl-rloo", changes={"rl.steps": 6})
    before = trained_weights(stage).clone()
    outcome = train(stage)
    assert outcome.log["kl"].iloc[0] == pytest.approx(0, abs=1e-5)
    after = trained_weights(stage)
    assert before.shape == after.shape
    assert not torch.equal(before, after)
    assert len(outcome.trajectory) == 2


# The proxy


@pytest.fixture(scope="module")
def built_proxy(prepare):
    changes = {"steps": 120, "pairs_per_step": 16, "learning_rate": 2.0e-2}
    stage = prepare("reward-model", changes={f"reward_model.{key}": value for key, value in changes.items()})
    outcome = train(stage)
    return stage, outcome, publish_stage(stage, outcome)


def test_a_reward_model_learns_to_prefer_and_is_what_was_saved(built_proxy):
    stage, outcome, folder = built_proxy
    assert outcome.trajectory["pair_loss"].iloc[-1] < outcome.trajectory["pair_loss"].iloc[0]  # this base knows little
    metrics = folders.read_json(folder / folders.METRICS)
    assert set(metrics["evaluation"]["dev"]) == {"n", "majority_reward", "accuracy", "margin", "pair_loss"}
    scored = pd.read_parquet(folder / folders.answers_file("dev"))
    right = scored["score_acceptable"] - scored["score_unacceptable"]
    wins = (right > 0) == (scored["label"] == 1)
    assert metrics["evaluation"]["dev"]["accuracy"] == pytest.approx(wins.mean())
    settings = stage.settings
    again = models.start_reward_model(
        stage.base, folder / folders.POLICY, settings.model, settings.adaptation, 5, stage.tokenizer.pad_token_id
    )
    assert not any(weight.requires_grad for weight in again.parameters())
    dev = corpus.fixed_subset(stage.corpus, "dev", None)
    found = reward_model.label_scores(again, stage, dev)
    np.testing.assert_allclose(found[:, 1], scored["score_acceptable"], atol=1e-4)


def test_scores_do_not_depend_on_batch_mates(built_proxy):
    stage, _, folder = built_proxy
    questions = prompts.prompt_ids(stage.tokenizer, stage.settings.prompt, stage.corpus["sentence"].iloc[:7])
    pairs = [(question, answer_ids(stage, ["acceptable"])[0]) for question in questions]
    stage.policy.eval()
    with torch.no_grad():
        alone = [stage.policy(torch.tensor([question + answer])).logits.item() for question, answer in pairs]
    assert reward_model.scores(stage.policy, pairs, 4) == pytest.approx(alone, abs=1e-4)


def test_rl_is_paid_by_the_proxy_and_measures_both_rewards(built_proxy, prepare, built_sft):
    stage = prepare("sft-rl-proxy")
    told = functions(stage)
    chat = prompts.prompt_messages(stage.settings.prompt, "John slept.")
    completions = answer_ids(stage, ["acceptable", "unacceptable", "acceptable"])
    paid = told["proxy"](prompts=[chat] * 3, completion_ids=completions)
    [question] = prompts.chat_ids(stage.tokenizer, [chat])
    expected = reward_model.scores(stage.proxy, [(question, completion) for completion in completions], 1)
    assert paid == pytest.approx(expected, abs=1e-4)
    assert paid[0] == paid[2] != paid[1]
    outcome = train(stage)
    assert {"rewards/proxy/mean", "rewards/gold/mean"} <= set(outcome.log)
    assert outcome.trajectory["reward_proxy"].notna().all()
    assert outcome.log["reward"].iloc[0] == pytest.approx(outcome.log["rewards/proxy/mean"].iloc[0])


# Both at once


def joint_trainer(prepare, weight):
    stage = prepare("joint-m0.5", changes={"rl.rows_per_pass": 4})
    # the run's own weight has won over the profile's
    settings = stage.settings.model_copy(update={"joint": stage.settings.joint.model_copy(update={"weight": weight})})
    stage = stage._replace(settings=settings)
    trainer = trainer_of(stage)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def gradient_of_update(trainer):
    """The gradient of one joint update with the answers that seed 3 samples."""
    inputs = [trainer.train_dataset[place] for place in range(3) for _ in range(4)]
    trainer.model.zero_grad()
    torch.manual_seed(3)
    trainer.training_step(trainer.model, inputs, None)
    return gradient(trainer.model)


def test_an_update_is_the_weighted_sum_of_imitation_and_reward(prepare):
    parts = {weight: gradient_of_update(joint_trainer(prepare, weight)) for weight in (0.0, 0.3, 1.0)}
    assert parts[0.0].norm() > 0
    assert parts[1.0].norm() > 0
    torch.testing.assert_close(parts[0.3], 0.3 * parts[1.0] + 0.7 * parts[0.0], rtol=1e-3, atol=1e-6)


def test_imitation_is_the_mean_negative_log_probability_of_the_answers(prepare):
    trainer = joint_trainer(prepare, 1.0)
    found = gradient_of_update(trainer)
    trainer.model.zero_grad()
    losses = []
    for question, answer in trainer.examples[:6]:
        logps = trainer.model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
        places = range(len(question) - 1, len(question) + len(answer) - 1)
        losses.append(-sum(logps[place, token] for place, token in zip(places, answer, strict=True)))
    (sum(losses) / len(losses)).backward()
    expected = gradient(trainer.model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_weights_in_phases_take_turns_and_end_with_rl():
    joint = load_study("tiny").profile.joint.model_copy(update={"steps": 20, "phases": 2})
    assert [weight_at(joint, step) for step in range(20)] == ([1.0] * 5 + [0.0] * 5) * 2
    assert weight_at(joint.model_copy(update={"phases": 0, "weight": 0.3}), 7) == 0.3


@pytest.mark.parametrize("run", ["joint-m0.5", "interleaved"])
def test_a_joint_stage_trains_and_repeats(prepare, run):
    first, again = (train(prepare(run, changes={"joint.steps": 5})) for _ in range(2))
    assert first.trajectory.equals(again.trajectory)
    assert first.trajectory["sft_loss"].iloc[0] != first.trajectory["sft_loss"].iloc[-1]
    assert first.log["sft_loss"].notna().sum() == 5
    assert first.log["reward"].notna().sum() == 5  # of five steps, or of ten that take turns


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
