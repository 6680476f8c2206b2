"""Gradients of a policy: against autograd of the whole loss and reward, and against the parameters themselves."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from nondecoupling.analysis import theory
from nondecoupling.study import folders
from nondecoupling.study.results import label_log_probabilities
from nondecoupling.training import gradients
from nondecoupling.training.evaluation import predict
from nondecoupling.training.gradients import Sentences
from trainers import disturb, gradient

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def measured(prepare, built_sft):
    """Stage, sentences, log-odds and gradients of the tiny SFT policy, moved away from where labels agree with it."""
    stage = prepare("gradients-sft")
    disturb(stage.policy)
    stage.policy.eval()
    sentences = gradients.sentences_of(stage)
    return stage, sentences, *gradients.sentence_gradients(stage.policy, sentences)


def test_log_odds_are_those_that_policies_are_measured_by(measured):
    stage, sentences, log_odds, _ = measured
    table = gradients.fixed_subset(stage.corpus, "dev", len(sentences.y))
    logp = label_log_probabilities(predict(stage.policy, stage.tokenizer, stage.settings.prompt, table, 7, 0))
    assert log_odds == pytest.approx(logp[:, 1] - logp[:, 0], abs=1e-4)
    agreed = np.where(table["truth"] == 1, table["agreement"], 1 - table["agreement"])
    assert sentences.y == pytest.approx(agreed.astype(float))
    assert set(np.round(sentences.y, 2)) == {0.1, 0.9}  # both labels, by known disagreement


@pytest.mark.parametrize("goal", ["loss", "reward"])
def test_weighted_sums_of_sentence_gradients_are_autograds_of_loss_and_reward(measured, goal):
    stage, sentences, log_odds, each = measured
    weights = getattr(gradients, f"{goal}_weights")(log_odds, sentences.y)
    mine = each.T.double() @ torch.tensor(weights) / len(weights)
    stage.policy.zero_grad()
    odds, y = gradients.log_odds_of(stage.policy, sentences, range(len(weights))).double(), torch.tensor(sentences.y)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, y)
    whole = loss if goal == "loss" else ((2 * y - 1) * (2 * odds.sigmoid() - 1)).mean()
    whole.backward()
    assert float(whole) == pytest.approx(getattr(gradients, f"{goal}_of")(log_odds, sentences.y), abs=1e-5)
    torch.testing.assert_close(gradient(stage.policy).double(), mine, rtol=1e-3, atol=1e-5 * float(mine.abs().max()))


def test_rewards_gradient_is_that_which_grpo_follows_in_expectation():
    """`theory.objective_gradient` is what trl's trainer was shown to follow (test_oracle); here without its KL term."""
    log_odds, y = RNG.normal(size=9), RNG.uniform(size=9)
    known = theory.objective_gradient(log_odds, log_odds, y, 1.0)
    assert gradients.reward_weights(log_odds, y) == pytest.approx(known)


def problem(n=40, size=60):
    """Gradients (n, size), log-odds and y of a made-up policy."""
    return RNG.normal(size=(n, size)) @ np.diag(np.linspace(3, 0.1, size)), 2 * RNG.normal(size=n), RNG.uniform(size=n)


def test_the_gram_matrix_says_what_the_parameters_say():
    each, log_odds, y = problem()
    n, p = len(y), expit(log_odds)
    of_loss, of_reward = (p - y) @ each / n, (2 * p * (1 - p) * (2 * y - 1)) @ each / n
    h = (each * (p * (1 - p))[:, None]).T @ each / n
    values, vectors = np.linalg.eigh(h)
    found = gradients.summary(each @ each.T, log_odds, y, seed=0)
    assert found["loss_gradient"] == pytest.approx(np.linalg.norm(of_loss))
    cosine = -of_loss @ of_reward / np.linalg.norm(of_loss) / np.linalg.norm(of_reward)
    assert found["cosine"] == pytest.approx(cosine)
    for k in gradients.TOP[:-1]:
        top = vectors[:, ::-1][:, :k]
        assert found[f"reward_top_{k}"] == pytest.approx(np.sum((top.T @ of_reward) ** 2) / np.sum(of_reward**2))
    assert found["loss_top_50"] == pytest.approx(1)  # more than there are sentences
    assert found["directions"] == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert found["bound"] >= abs(found["cosine"])
    one, two = slice(0, n, 2), slice(1, n, 2)
    slopes = []
    for paid, held in ((one, two), (two, one)):
        moved = (2 * p * (1 - p) * (2 * y - 1))[paid] @ each[paid] / (n / 2)
        slopes.append((p - y)[held] @ each[held] @ moved / (n / 2) / (moved @ moved))
    assert found["slope"] == pytest.approx(np.mean(slopes))


def test_halves_are_free_of_the_noise_that_one_sample_shares_with_itself():
    """Gradients that have nothing to do with the labels have no cosine; sharing sentences makes one."""
    n, cosines = 200, []
    for _ in range(40):
        each, log_odds = RNG.normal(size=(n, 300)), np.zeros(n)
        y = (RNG.uniform(size=n) < 0.5).astype(float)
        gram = each @ each.T
        cosines.append(gradients.summary(gram, log_odds, y, seed=0)["cosine"])
        split = gradients.split_summary(
            gram,
            gradients.loss_weights(log_odds, y),
            gradients.reward_weights(log_odds, y),
            gradients.curvature_weights(log_odds),
        )
        assert abs(split["slope"]) < 0.5
    assert np.mean(cosines) > 0.9  # of pure noise


def test_the_second_order_is_the_second_order():
    log_odds, y, along = RNG.normal(size=30), RNG.uniform(size=30), RNG.normal(size=30)
    gaps = []
    for tau in (1e-2, 2e-2):
        found = gradients.predicted(log_odds, y, along, tau)
        gaps.append([abs(found[f"{goal}_second"] - found[f"{goal}_linear"]) for goal in ("loss", "reward")])
        assert found["loss_linear"] == pytest.approx(gradients.loss_of(log_odds + tau * along, y))
    assert np.divide(*gaps[::-1]) == pytest.approx(8, rel=0.3)  # what is left is of the third order


def test_paths_start_at_the_policy_climb_and_leave_it_alone(measured):
    stage, sentences, log_odds, each = measured
    before = gradients.flat(gradients.trained(stage.policy))
    measured_path = gradients.follow(stage.policy, sentences, slice(0, 20, 2), 0.5, 4, torch.optim.SGD, batch=6)
    assert measured_path[0] == pytest.approx(log_odds, abs=1e-4)
    assert len(measured_path) == 5
    paid = [gradients.reward_of(odds[::2], sentences.y[::2]) for odds in measured_path]
    assert np.all(np.diff(paid) > 0)
    torch.testing.assert_close(gradients.flat(gradients.trained(stage.policy)), before, rtol=0, atol=0)
    found = gradients.paths(stage, sentences, log_odds, each)
    assert set(found["path"]) == {"plain", "adam"}
    assert set(found["paid"]) == {0, 1}
    ends = found.groupby(["path", "paid"])[["loss_second"]].agg(["first", "last"])["loss_second"]
    assert (ends["last"] - ends["first"]).to_numpy() == pytest.approx(gradients.RISE)


def test_a_short_step_goes_where_the_start_says(measured):
    stage, sentences, log_odds, each = measured
    paid = slice(0, 20, 2)
    direction = each[paid].T @ torch.tensor(gradients.reward_weights(log_odds, sentences.y)[paid]).float() / 10
    tau = 1e-2 / float(direction.norm())
    moved = gradients.follow(stage.policy, sentences, paid, tau, 1, torch.optim.SGD, batch=20)[-1]
    assert moved - log_odds == pytest.approx(
        tau * (each @ direction).numpy(), abs=0.05 * np.abs(moved - log_odds).max()
    )


def test_the_stage_publishes_its_numbers_and_they_are_collected(prepare, built_sft, tiny_study):
    stage = prepare("gradients-sft")
    geometry = gradients.measure_gradients(stage)
    folder = gradients.publish_gradients(stage, geometry)
    record = folders.read_json(folder / folders.METRICS)
    assert record["parents"] == {"sft": folders.sha256(built_sft.folder / folders.METRICS)}
    assert record["evaluation"]["dev"] == geometry.summary
    assert folders.damaged_file(folder) is None
    assert (folder / folders.PATHS).exists()
    only = prepare("gradients-base")
    assert gradients.measure_gradients(only).paths is None


def test_a_policy_of_all_weights_has_gradients_of_all(prepare):
    stage = prepare("gradients-base", changes={"adaptation.method": "full", "gradients.sentences": 4})
    log_odds, each = gradients.sentence_gradients(stage.policy, gradients.sentences_of(stage))
    assert each.shape == (4, sum(p.numel() for p in stage.policy.parameters()))
    assert np.isfinite(log_odds).all()


def test_labels_take_the_place_of_probabilities_that_nobody_knows(prepare):
    stage = prepare("gradients-base")
    unknown = stage.corpus.assign(agreement=np.nan, truth=None)
    sentences: Sentences = gradients.sentences_of(stage._replace(corpus=unknown))
    assert set(sentences.y) == {0.0, 1.0}
