"""Measured policies, against plain forward passes, enumeration of all answers, sklearn and scipy."""

import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers import Qwen3Config, Qwen3ForCausalLM

from nondecoupling.study.profile import Model, Prompt
from nondecoupling.study.study import load_study
from nondecoupling.task import prompts
from nondecoupling.training import models, pretrain
from nondecoupling.training.evaluation import mean_outcome_kl, measure_policy, outcomes, predict, summarise
from nondecoupling.training.generation import Prefix, batches, common_start, padded

PLAIN = Model(folder=None, quantization="none", dtype="float32")

PROMPT = Prompt(
    template="{sentence}",
    acceptable="acceptable",
    unacceptable="unacceptable",
    other_wording="{answer}.",
    max_new_tokens=5,
)
LIMIT = 5


def make_uneven(model):
    """Large random weights: a policy whose answers differ in probability."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def settings():
    return load_study("nano", overrides={"prompt.max_new_tokens": LIMIT}).profile


@pytest.fixture(scope="module")
def table(sentences):
    return sentences.iloc[:20].reset_index(drop=True)


@pytest.fixture(scope="module", params=["random", "pretrained"])
def policy(request, settings):
    """A policy with its tokenizer: one with random weights, and one that has learnt to answer."""
    if request.param == "pretrained":
        folder = request.getfixturevalue("built_base") / "policy"
        return models.load_base(folder, PLAIN).eval(), models.load_tokenizer(folder)
    tokenizer = request.getfixturevalue("nano_tokenizer")
    return make_uneven(pretrain.new_model(settings.pretrain, tokenizer, seed=0)), tokenizer


def answers_of(policy, settings, table, batch_size=7, seed=0):
    model, tokenizer = policy
    return predict(model, tokenizer, settings.prompt, table, batch_size, seed)


def plain_log_probability(model, question, response):
    """log p(response | question) from one forward pass without padding or cache."""
    with torch.no_grad():
        logits = model(torch.tensor([question + response])).logits[0]
    logp = torch.log_softmax(logits, dim=-1)
    return sum(logp[len(question) - 1 + place, token].item() for place, token in enumerate(response))


# Exact probabilities


def test_log_probabilities_equal_those_of_a_plain_forward_pass(policy, settings, table):
    model, tokenizer = policy
    answers = answers_of(policy, settings, table)
    questions = prompts.prompt_ids(tokenizer, settings.prompt, table["sentence"])
    assert len({len(question) for question in questions}) > 1  # so that there is padding
    for column in ("acceptable", "unacceptable"):
        response = prompts.response_ids(tokenizer, column)
        expected = [plain_log_probability(model, question, response) for question in questions]
        assert answers[f"logp_{column}"].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_batch_size_changes_no_probability_and_no_greedy_answer(policy, settings, table):
    one, many = (answers_of(policy, settings, table, batch_size=size) for size in (1, 20))
    columns = ["logp_acceptable", "logp_unacceptable"]
    np.testing.assert_allclose(one[columns], many[columns], rtol=1e-5, atol=1e-5)
    assert one["greedy"].tolist() == many["greedy"].tolist()


def test_predictions_keep_the_sentences_and_their_columns(policy, settings, table):
    known, found = ["sentence", "label", "source"], ["logp_acceptable", "logp_unacceptable", "sampled", "greedy"]
    some = table.iloc[5:].set_index(np.arange(100, 115))
    answers = answers_of(policy, settings, some.assign(truth=1 - some["label"], agreement=0.75))
    assert answers.columns.tolist() == [*known, "truth", "agreement", *found]
    pd.testing.assert_frame_equal(answers[known], table.loc[5:, known].reset_index(drop=True))
    assert (answers["truth"] == 1 - answers["label"]).all()
    assert (answers["agreement"] == 0.75).all()
    assert answers_of(policy, settings, some).columns.tolist() == known + found  # where nobody knows the truth


@pytest.fixture(scope="module")
def three_tokens():
    """A policy over strings of three tokens: "a" (0), the end (1) and "b" (2)."""
    config = Qwen3Config(
        vocab_size=3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return make_uneven(Qwen3ForCausalLM(config))


def test_all_answers_up_to_a_length_have_probability_one_and_are_sampled_as_often(three_tokens):
    length, copies, question = 3, 4000, [2, 0, 0, 2]
    ended = [[*body, 1] for n in range(length) for body in itertools.product([0, 2], repeat=n)]
    cut = [list(body) for body in itertools.product([0, 2], repeat=length)]
    with torch.no_grad():
        prefix = Prefix(three_tokens, [[0], question], pad=0)
        exact = {tuple(answer): prefix.log_probability(answer)[1].exp().item() for answer in ended[1:] + cut}
        exact[(1,)] = prefix.first[1].softmax(-1)[1].item()  # the empty answer
        many = Prefix(three_tokens, [question] * copies, pad=0)
        sampled = many.answers(eos=1, limit=length, generator=torch.Generator().manual_seed(0))
    assert len(exact) == 15
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    counts = {answer: 0 for answer in exact}
    for answer in sampled:
        counts[tuple(answer)] += 1  # KeyError: not an answer at all
    expected = copies * np.array(list(exact.values())) / sum(exact.values())
    seen = np.array(list(counts.values()))
    often = expected >= 5  # the chi-square approximation needs that many
    assert often.sum() >= 4
    seen, expected = (np.append(x[often], x[~often].sum()) for x in (seen, expected))
    assert stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 0.001


# Sampled and greedy answers


def test_greedy_answers_equal_those_of_generate(policy, settings, table):
    model, tokenizer = policy
    answers = answers_of(policy, settings, table)
    for sentence, greedy in zip(table["sentence"], answers["greedy"], strict=True):
        [ids] = prompts.prompt_ids(tokenizer, settings.prompt, [sentence])
        inputs = torch.tensor([ids])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=LIMIT,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert greedy == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_sampled_answers_follow_the_exact_probabilities(policy, settings, table):
    model, tokenizer = policy
    copies = 3000
    [question] = prompts.prompt_ids(tokenizer, settings.prompt, table["sentence"][:1])
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([question])).logits[0, -1].double(), -1).numpy()
        prefix = Prefix(model, [question] * copies, tokenizer.pad_token_id)
        sampled = prefix.answers(tokenizer.eos_token_id, LIMIT, generator=torch.Generator().manual_seed(0))
    counts = np.bincount([answer[0] for answer in sampled], minlength=len(p))
    often = copies * p >= 5
    assert often.sum() >= 2
    seen, expected = (np.append(x[often], x[~often].sum()) for x in (counts, copies * p))
    assert stats.chisquare(seen, expected * copies / expected.sum()).pvalue > 0.001


def test_a_pretrained_policy_gives_each_label_as_often_as_its_probability_says(built_base, settings, table):
    folder = built_base / "policy"
    model, tokenizer = models.load_base(folder, PLAIN).eval(), models.load_tokenizer(folder)
    copies = 3000
    [question] = prompts.prompt_ids(tokenizer, settings.prompt, table["sentence"][:1])
    with torch.no_grad():
        prefix = Prefix(model, [question] * copies, tokenizer.pad_token_id)
        sampled = prefix.answers(tokenizer.eos_token_id, LIMIT, generator=torch.Generator().manual_seed(0))
    for text in ("acceptable", "unacceptable"):
        response = prompts.response_ids(tokenizer, text)
        p = math.exp(plain_log_probability(model, question, response))
        assert stats.binomtest(sampled.count(response), copies, p).pvalue > 0.001


def test_the_seed_decides_the_sampled_answers_and_nothing_else(policy, settings, table):
    first, again, other = (answers_of(policy, settings, table, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first.drop(columns="sampled"), other.drop(columns="sampled"))
    assert (first["sampled"] != other["sampled"]).any()


def test_measuring_samples_by_the_replication_and_alike_for_all_its_policies(policy, settings, table):
    (model, tokenizer), tables = policy, {"dev": table}
    given = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"batch_size": 7})})
    sampled = [
        measure_policy(model, tokenizer, given, seed, tables, {})[1]["dev"]["sampled"].tolist() for seed in (3, 4)
    ]
    assert sampled[0] != sampled[1]
    assert sampled == [answers_of(policy, settings, table, seed=seed)["sampled"].tolist() for seed in (3, 4)]


def test_answers_end_with_the_end_token_or_at_the_limit(policy, settings, table):
    model, tokenizer = policy
    questions = prompts.prompt_ids(tokenizer, settings.prompt, table["sentence"])
    with torch.no_grad():
        answers = Prefix(model, questions, tokenizer.pad_token_id).answers(tokenizer.eos_token_id, LIMIT)
    for answer in answers:
        assert len(answer) <= LIMIT
        assert tokenizer.eos_token_id not in answer[:-1]
        assert answer[-1] == tokenizer.eos_token_id or len(answer) == LIMIT


def test_scoring_and_sampling_leave_the_prefix_as_it_was(policy, settings, table):
    model, tokenizer = policy
    questions = prompts.prompt_ids(tokenizer, settings.prompt, table["sentence"])
    response = prompts.response_ids(tokenizer, "acceptable")
    with torch.no_grad():
        prefix = Prefix(model, questions, tokenizer.pad_token_id)
        before = prefix.log_probability(response)
        prefix.answers(tokenizer.eos_token_id, LIMIT)
        assert torch.equal(prefix.log_probability(response), before)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(policy, settings, table, training):
    model, _ = policy
    model.train(training)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    weights = [weight.clone() for weight in model.parameters()]
    answers_of(policy, settings, table)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert model.training is training
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    model.eval()


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("left", [[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]]),
        ("right", [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
    ],
)
def test_rows_are_padded_on_the_side_that_is_asked_for(side, ids, mask):
    found = padded([[5, 6, 7], [8]], 9, side)
    assert [part.tolist() for part in found] == [ids, mask]


def test_batches_are_consecutive_and_complete():
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]


# Metrics


LABELS = [1, 1, 1, 0]
UNACCEPTABLE, ACCEPTABLE = [0.1, 0.6, 0.2, 0.5], [0.8, 0.3, 0.7, 0.25]


def predictions(unacceptable, acceptable, labels=LABELS, sampled="", greedy=""):
    with np.errstate(divide="ignore"):
        return pd.DataFrame(
            {
                "label": labels,
                "logp_unacceptable": np.log(unacceptable),
                "logp_acceptable": np.log(acceptable),
                "sampled": sampled,
                "greedy": greedy,
            }
        )


@pytest.fixture(scope="module")
def by_hand():
    table = predictions(
        UNACCEPTABLE,
        ACCEPTABLE,
        sampled=["acceptable", "Unacceptable.", "acceptable", "It is Unacceptable!"],
        greedy=["acceptable", "unacceptable", "no idea", "unacceptable"],
    )
    references = {"parent": table, "base": predictions([0.2, 0.5, 0.2, 0.25], [0.7, 0.25, 0.7, 0.5])}
    return summarise(table, PROMPT, (3, 2), references)


PRODUCT = 0.8 * 0.3 * 0.7 * 0.5  # of the labels' probabilities


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("n", 4),
        ("majority_reward", 0.5),
        ("sft_loss", -math.log(PRODUCT) / 4),
        ("sft_loss_per_token", -math.log(PRODUCT) / (2 + 2 + 2 + 3)),
        ("label_loss", -math.log(PRODUCT / (0.9 * 0.9 * 0.9 * 0.75)) / 4),
        ("label_mass", (0.9 + 0.9 + 0.9 + 0.75) / 4),
        ("reward_exact", (0.6 - 0.4 + 0.4 + 0.0) / 4),
        ("reward_sampled", (1 - 1 + 1 + 1) / 4),
        ("reward_sampled_strict", (1 - 1 + 1 - 1) / 4),
        ("reward_greedy", (1 - 1 - 1 + 1) / 4),
        ("accuracy", 3 / 4),
        ("balanced_accuracy", (2 / 3 + 1) / 2),
        ("mcc", (2 * 1 - 0 * 1) / math.sqrt(2 * 3 * 1 * 2)),
        ("predicted_acceptable_rate", 2 / 4),
        ("kl_to_parent", 0.0),
    ],
)
def test_metrics_by_hand(by_hand, metric, value):
    assert by_hand[metric] == pytest.approx(value, abs=1e-12)


def test_metrics_of_four_answers_by_hand():
    """Of three sentences with labels 3, 0, 2 the likeliest answers are 3, 0 and 1."""
    four = load_study("four").profile.prompt
    p = np.array([[0.1, 0.1, 0.1, 0.6], [0.5, 0.2, 0.1, 0.2], [0.1, 0.4, 0.3, 0.2]])
    table = pd.DataFrame(np.log(p), columns=[f"logp_{label}" for label in range(4)])
    table = table.assign(
        label=[3, 0, 2], sampled=["nothing", "order", "Tense."], greedy=["nothing", "argument", "order"]
    )
    found = summarise(table, four, (2, 2, 2, 3), {"parent": table})
    expected = {
        "majority_reward": 2 / 3 - 1,
        "sft_loss": -math.log(0.6 * 0.5 * 0.3) / 3,
        "sft_loss_per_token": -math.log(0.6 * 0.5 * 0.3) / 7,
        "label_loss": -math.log(0.6 / 0.9 * 0.5 * 0.3) / 3,
        "reward_exact": (0.2 + 0.0 - 0.4) / 3,
        "reward_sampled": 1 / 3,
        "reward_sampled_strict": -1 / 3,
        "reward_greedy": 1 / 3,
        "accuracy": 2 / 3,
        "predicted_acceptable_rate": 1 / 3,
        "mcc": sklearn_metrics.matthews_corrcoef([3, 0, 2], [3, 0, 1]),
        "entropy": stats.entropy([[*p[0], 0.1], [*p[1], 0.0], [*p[2], 0.0]], axis=1).mean(),
        "kl_to_parent": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_metrics_agree_with_sklearn_and_scipy(by_hand):
    outcomes = np.column_stack([UNACCEPTABLE, ACCEPTABLE, [0.1, 0.1, 0.1, 0.25]])
    reference = np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.25, 0.5, 0.25]])
    two = outcomes[:, :2] / outcomes[:, :2].sum(1, keepdims=True)
    likelier = [1, 0, 1, 0]
    assert by_hand["label_loss"] == pytest.approx(sklearn_metrics.log_loss(LABELS, two))
    assert by_hand["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(LABELS, likelier))
    assert by_hand["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(LABELS, likelier))
    assert by_hand["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(LABELS, likelier))
    assert by_hand["entropy"] == pytest.approx(stats.entropy(outcomes, axis=1).mean())
    assert by_hand["kl_to_base"] == pytest.approx(stats.entropy(outcomes, reference, axis=1).mean())


def test_metrics_are_plain_numbers(by_hand):
    assert {type(value) for value in by_hand.values()} == {int, float}
    assert list(by_hand)[-2:] == ["kl_to_parent", "kl_to_base"]


def test_a_constant_answer_has_no_correlation_and_half_the_balanced_accuracy():
    table = predictions([0.1] * 4, [0.9] * 4, sampled=["acceptable"] * 4, greedy=["acceptable"] * 4)
    metrics = summarise(table, PROMPT, (2, 2), {})
    assert (metrics["mcc"], metrics["balanced_accuracy"]) == (0.0, 0.5)
    assert metrics["predicted_acceptable_rate"] == 1
    assert metrics["reward_greedy"] == metrics["majority_reward"] == 0.5


def test_impossible_answers_leave_entropy_and_divergence_finite():
    sure = predictions([0, 1, 0, 1], [1, 0, 1, 0])
    assert outcomes(sure).tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert mean_outcome_kl(sure, sure) == 0
    assert math.isfinite(mean_outcome_kl(predictions(UNACCEPTABLE, ACCEPTABLE), sure))
    assert summarise(sure, PROMPT, (2, 2), {})["entropy"] == 0


def test_divergence_is_directed():
    one, other = predictions([0.5], [0.5], labels=[1]), predictions([0.25], [0.75], labels=[1])
    assert mean_outcome_kl(one, other) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert mean_outcome_kl(other, one) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        ([[1, 2, 3], [1, 2, 4]], [1, 2]),
        ([[1, 2, 3], [1, 2, 3]], [1, 2]),  # the last token of each row is read with the row
        ([[1, 2], [1, 2, 3]], [1]),
        ([[1, 2], [3, 2]], []),
        ([[7]], []),
    ],
)
def test_what_all_prompts_begin_with(rows, start):
    assert common_start(rows) == start
