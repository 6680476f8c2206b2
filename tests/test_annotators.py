"""What annotators say, for any number of labels: known shares, and labels that are drawn from them."""

import numpy as np
import pandas as pd
import pytest

from nondecoupling.study.study import load_study, with_overrides
from nondecoupling.task import annotators, corpus, grammar

FOUR, NANO = load_study("four").profile.data, load_study("nano").profile.data


@pytest.fixture(scope="module")
def sentences():
    return grammar.sample_sentences(2000, seed=1, phenomena=FOUR.violations)


def test_only_phenomena_with_a_label_are_drawn_and_each_as_often(sentences):
    assert sentences["source"].value_counts().between(666, 667).all()
    assert set(sentences["source"]) == set(FOUR.violations)


def test_the_truth_is_the_violation_or_else_the_last_label(sentences):
    truth = annotators.truths(FOUR, sentences)
    assert (truth[sentences["mark"] == ""] == 3).all()
    starred = sentences[sentences["mark"] == "*"]
    assert (truth[starred.index] == starred["source"].map({"argument": 0, "order": 1, "tense": 2})).all()


def test_shares_by_hand():
    table = pd.DataFrame({"source": ["argument", "tense", "order"], "mark": ["*", "*", ""]})
    expected = [[0.9, 0.03, 0.01, 0.06], [0.12, 0.04, 0.6, 0.24], [0.15, 0.075, 0.025, 0.75]]
    assert annotators.label_shares(FOUR, table) == pytest.approx(np.array(expected))
    two = annotators.label_shares(NANO, table.assign(source="wh"))
    assert two == pytest.approx(np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]))


def test_labels_are_drawn_in_the_known_shares_up_to_a_sentence_and_by_chance(sentences):
    shares = annotators.label_shares(FOUR, sentences)
    labels, others = (annotators.drawn_labels(FOUR, sentences, seed) for seed in (0, 1))
    for rows in sentences.groupby(["source", "mark"]).indices.values():
        counts = np.bincount(labels.iloc[rows], minlength=4)
        assert np.abs(counts - shares[rows].sum(0)).max() <= 1
        assert (np.bincount(others.iloc[rows], minlength=4) == counts).all()
    assert 0 < (labels != others).mean() < 0.7
    assert labels.equals(annotators.drawn_labels(FOUR, sentences, 0))


def test_a_corpus_of_four_labels_is_written_read_and_known_again(tmp_path):
    data = FOUR.model_copy(update={"train_size": 300, "dev_size": 60})
    corpus.generate_corpus(data, 0, tmp_path)
    read = corpus.load_corpus(tmp_path, data)
    assert set(read["label"]) == {0, 1, 2, 3}
    known = annotators.with_known_shares(data, read)
    assert annotators.share_columns(known) == ["share_0", "share_1", "share_2", "share_3"]
    assert known[annotators.share_columns(known)].sum(axis=1).to_numpy() == pytest.approx(1)
    wrong = (known["label"] != known["truth"]).groupby(known["source"]).mean()
    assert wrong.to_dict() == pytest.approx(data.disagreement, abs=0.03)
    described = corpus.describe_corpus(read)
    assert described["share_acceptable"].to_numpy() == pytest.approx(
        (read["label"] == 3).groupby(read["split"], sort=False).mean().to_numpy()
    )
    assert described.loc["train", "majority_reward"] == pytest.approx(
        2 * described.loc["train", "share_acceptable"] - 1
    )
    true = annotators.with_true_labels(known)
    assert (true["label"] == known["truth"]).all()
    assert (true[annotators.share_columns(true)].to_numpy().argmax(1) == true["label"]).all()


def test_of_two_labels_nothing_is_kept_that_the_agreement_does_not_say(sentences):
    assert annotators.share_columns(annotators.with_known_shares(NANO, sentences)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.contradictions": None}, "need each other"),
        ({"data.violations": {"argument": 0, "order": 2}}, "each number from 0 on"),
        ({"data.violations": {}}, "two labels or more"),
        ({"data.violations": {"argument": 0, "order": 1}}, "3 rows of 3 shares"),
        ({"data.contradictions": [[0.0, 0.5, 0.5, 0.5]] * 4}, "row 0 of contradictions"),
        ({"data.folder": "elsewhere"}, "generated corpus"),
        ({"prompt.unacceptable": "wrong"}, "2 answers, but data knows 4 labels"),
        ({"prompt.unacceptable": ["a", "A", "b"]}, "must differ"),
        ({"rl.beta": 0.0}, "rl.beta must be positive"),
        ({"pretrain.taught": {"argument": [0.3, 0.7]}}, "each of the 4 answers"),
        ({"pretrain.taught": {"argument": [[0.5, 0.1, 0.1, 0.1], [0.25] * 4]}}, "must have the sum 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(change, words):
    with pytest.raises(ValueError, match=words):
        with_overrides(load_study("four").profile, change)


def test_a_phenomenon_that_the_grammar_lacks_is_refused():
    with pytest.raises(ValueError, match="'spelling' is no phenomenon"):
        annotators.phenomena(FOUR.model_copy(update={"violations": {"argument": 0, "spelling": 1}}))
    with pytest.raises(ValueError, match="'tense' is missing"):
        annotators.disagreement_by_source(FOUR.model_copy(update={"disagreement": {"argument": 0.1, "order": 0.1}}))
