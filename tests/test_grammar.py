"""The grammar's contract: distinct, reproducible, balanced sentences, and label noise of exactly the rate asked for."""

import math
import os
import re
import subprocess
import sys
import time

import pandas as pd
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from nondecoupling.task import grammar


@pytest.fixture(scope="module")
def balanced():
    return grammar.sample_sentences(20_000, seed=1, grammatical_share=0.5)


def word_forms(sentences, lower=True):
    """One row per sentence and distinct word form in it."""
    text = sentences.str.lower() if lower else sentences
    return text.str.findall(r"[A-Za-z]+").map(lambda forms: sorted(set(forms))).explode()


def readings(sentence, label):
    """Phenomena whose grammar makes the sentence with that label."""
    return {source for source, patterns in PATTERNS[label].items() if any(p.fullmatch(sentence) for p in patterns)}


def pattern(template, label):
    """Regular expression of a template's acceptable (1) or starred (0) sentences."""
    places = ["(?:" + "|".join(f" {form}" if form else "" for form in slot) + ")" for slot in slots(template, label)]
    return re.compile("".join(places) + re.escape(template[-1]))


def slots(template, label):
    places = grammar._slots(template, label)
    return [tuple(form[:1].upper() + form[1:] for form in places[0]), *places[1:]]


PATTERNS = {
    label: {source: [pattern(template, label) for template in group] for source, group in grammar.TEMPLATES.items()}
    for label in (0, 1)
}


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_table_has_the_columns_and_values_of_cola():
    table = grammar.sample_sentences(400, seed=0)
    assert list(table.columns) == ["source", "label", "mark", "sentence"]
    assert list(table.index) == list(range(400))
    assert table["label"].dtype == "int64"
    assert (table["mark"] == table["label"].map({1: "", 0: "*"})).all()


def test_same_seed_same_table_and_other_seed_another():
    first, again, other = (grammar.sample_sentences(500, seed=seed) for seed in (7, 7, 8))
    pd.testing.assert_frame_equal(first, again)
    assert not first["sentence"].equals(other["sentence"])


def test_table_does_not_depend_on_the_hash_seed():
    code = "from nondecoupling.task import grammar as g; print(g.sample_sentences(30, 5, {'a', 'b'}).to_csv())"
    tables = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert tables[0] == tables[1]


def test_sentences_are_distinct(balanced):
    assert balanced["sentence"].is_unique


def test_excluded_sentences_stay_out_and_the_rest_can_still_be_had():
    first = grammar.sample_sentences(20_000, seed=0)
    second = grammar.sample_sentences(20_000, seed=0, exclude=list(first["sentence"]))
    assert len(second) == 20_000
    assert not set(first["sentence"]) & set(second["sentence"])


def test_twenty_thousand_sentences_take_less_than_two_seconds():
    start = time.process_time()  # of this process: a busy machine is no failure
    grammar.sample_sentences(20_000, seed=3)
    assert time.process_time() - start < 2


def test_a_hundred_thousand_sentences_can_be_had():
    assert grammar.sample_sentences(100_000, seed=0)["sentence"].nunique() == 100_000


@pytest.mark.parametrize(
    ("n", "share", "acceptable"),
    [
        (1000, 0.75, 750),
        (1001, 0.75, 751),
        (10, 0.5, 5),
        (7, 0.3, 2),
        (40, 0, 0),
        (40, 1, 40),
        (1, 0.75, 1),
        (0, 0.5, 0),
    ],
)
def test_share_of_acceptable_sentences_is_exact(n, share, acceptable):
    table = grammar.sample_sentences(n, seed=2, grammatical_share=share)
    assert len(table) == n
    assert table["label"].sum() == acceptable


def test_default_share_is_the_constant():
    assert grammar.sample_sentences(200, seed=0)["label"].mean() == grammar.GRAMMATICAL_SHARE == 0.75


def test_phenomena_are_equally_frequent_in_both_labels(balanced):
    counts = balanced.groupby(["label", "source"]).size()
    assert len(counts) == 2 * len(grammar.PHENOMENA)
    assert counts.max() - counts.min() <= 1


def test_rows_are_shuffled(balanced):
    head = balanced.head(1000)
    assert 0.4 < head["label"].mean() < 0.6
    assert head["source"].nunique() == len(grammar.PHENOMENA)


# --- what the sentences are -------------------------------------------------------------------------------------------


def test_phenomena_are_described_and_plenty():
    assert len(grammar.PHENOMENA) >= 10
    assert list(grammar.PHENOMENA) == list(grammar.TEMPLATES)


@pytest.mark.parametrize("source", grammar.PHENOMENA)
def test_examples_of_a_phenomenon_are_its_own(source):
    good, bad = re.fullmatch(r".+: (.+[.?]) / \*(.+[.?])", grammar.PHENOMENA[source]).groups()
    assert source in readings(f" {good}", 1)
    assert readings(f" {bad}", 0) == {source}


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("source", grammar.PHENOMENA)
def test_a_phenomenon_has_many_sentences(source, label):
    assert sum(math.prod(map(len, slots(t, label))) for t in grammar.TEMPLATES[source]) >= 15_000


def test_no_sentence_is_both_acceptable_and_starred(balanced):
    for label, sentence in balanced[["label", "sentence"]].head(4000).itertuples(index=False):
        assert readings(f" {sentence}", label)
        assert not readings(f" {sentence}", 1 - label), sentence


def test_vocabulary_is_small(balanced):
    assert 100 < word_forms(balanced["sentence"]).nunique() <= 130


def test_sentences_are_short_and_spelled_as_sentences(balanced):
    lengths = balanced["sentence"].str.split(" ").map(len)
    assert lengths.min() >= 3
    assert lengths.max() <= 9
    assert balanced["sentence"].str.fullmatch(r"[A-Z][a-z]*( [A-Za-z]+)+[.?]").all()


def test_pairs_of_order_differ_in_nothing_but_order():
    for template in grammar.TEMPLATES["order"]:
        good, bad = (sorted(grammar._slots(template, label)) for label in (1, 0))
        assert good == bad


# --- no shortcut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [True, False], ids=["words", "cased words"])
@pytest.mark.parametrize("by", [[], ["source"]], ids=["overall", "within a phenomenon"])
def test_no_word_reveals_the_label(balanced, by, lower):
    rows = balanced.join(word_forms(balanced["sentence"], lower).rename("form"))
    shares = rows.groupby([*by, "form"])["label"].agg(["size", "mean"]).query("size >= 50")
    assert len(shares) > 100
    assert shares.query("not 0.3 < mean < 0.7").empty, shares.query("not 0.3 < mean < 0.7")


def test_a_bag_of_words_cannot_tell(balanced):
    train, held_out = balanced[:5000], balanced[5000:10_000]
    words = CountVectorizer(token_pattern=r"[A-Za-z]+")
    model = LogisticRegression(max_iter=500).fit(words.fit_transform(train["sentence"]), train["label"])
    assert model.score(words.transform(held_out["sentence"]), held_out["label"]) < 0.65


# --- label noise ------------------------------------------------------------------------------------------------------


def table_of(acceptable, starred):
    """A table of that many sentences of each truth, label == truth, with an index that is not 0, 1, 2, ..."""
    labels = [1] * acceptable + [0] * starred
    marks = ["" if label else "*" for label in labels]
    return pd.DataFrame({"label": labels, "mark": marks}, index=range(100, 100 + len(labels)))


@pytest.mark.parametrize(
    ("acceptable", "starred", "rate", "acceptable_flips", "starred_flips"),
    [
        (75, 25, 0.0, 0, 0),
        (75, 25, 0.2, 15, 5),
        (750, 250, 0.1, 75, 25),
        (7, 3, 0.3, 2, 1),  # 2.1 and 0.9
        (6, 6, 0.1, 0, 1),  # 0.6 and 0.6 round to 2 together, but the total is round(1.2) = 1
        (4, 4, 0.35, 2, 1),  # 1.4 and 1.4 round to 2 together, but the total is round(2.8) = 3
        (10, 0, 0.4, 4, 0),
        (0, 10, 0.4, 0, 4),
        (0, 0, 0.4, 0, 0),
    ],
)
def test_flips_are_counted_by_hand(acceptable, starred, rate, acceptable_flips, starred_flips):
    table = table_of(acceptable, starred)
    before = table.copy()
    noisy = grammar.flip_labels(table, rate, seed=0)
    pd.testing.assert_frame_equal(table, before)
    flipped = noisy["label"] != table["label"]
    assert flipped[table["mark"] == ""].sum() == acceptable_flips
    assert flipped[table["mark"] == "*"].sum() == starred_flips
    assert noisy["label"].isin([0, 1]).all()
    pd.testing.assert_frame_equal(noisy.drop(columns="label"), table.drop(columns="label"))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.125, 0.3, 0.499])
def test_flips_always_meet_the_total_and_fit_the_classes(rate):
    for acceptable in range(12):
        for starred in range(12):
            table = table_of(acceptable, starred)
            flipped = grammar.flip_labels(table, rate, seed=0)["label"] != table["label"]
            assert flipped.sum() == round(rate * (acceptable + starred))
            assert abs(flipped[table["mark"] == ""].sum() - rate * acceptable) <= 1


def test_flips_by_source_are_counted_within_each_and_concern_no_other():
    table = pd.concat([table_of(30, 10).assign(source=source) for source in "abc"], ignore_index=True)
    noisy = grammar.flip_labels(table, {"b": 0.2, "a": 0.0, "c": 0.475}, seed=0)
    flipped = noisy["label"] != table["label"]
    assert flipped.groupby([table["source"], table["mark"]]).sum().tolist() == [
        0,
        0,
        6,
        2,
        14,
        5,
    ]  # 19 of 40, 4.75 of the starred ten
    pd.testing.assert_frame_equal(noisy.drop(columns="label"), table.drop(columns="label"))


def test_flips_depend_on_the_seed_alone():
    table = table_of(300, 100)
    first, again, other = (grammar.flip_labels(table, 0.2, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert not first["label"].equals(other["label"])


def test_rewards_of_the_noisy_labels_are_those_of_the_closed_form():
    noisy = grammar.flip_labels(table_of(750, 250), 0.1, seed=0)
    truth = (noisy["mark"] == "").astype(int)
    right = (noisy["label"] == truth).mean()  # of the likelier label, in either class of truth
    assert 2 * right - 1 == pytest.approx(1 - 2 * 0.1)
    assert 2 * (0.9 * right + 0.1 * (1 - right)) - 1 == pytest.approx((1 - 2 * 0.1) ** 2)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_too_many_sentences_say_how_many_there_are_and_what_to_do():
    with pytest.raises(ValueError, match=r"^Only \d+ acceptable sentences .* are available where \d+ .*ask for fewer"):
        grammar.sample_sentences(10_000_000, seed=0)


def test_excluding_all_sentences_of_a_template_says_so(monkeypatch):
    template = "the (TALL) MALE slept {|*the PAPER} ."
    monkeypatch.setattr(grammar, "TEMPLATES", {"argument": (template,)})
    everything = grammar.sample_sentences(12, seed=0, grammatical_share=1)  # 4 times 3
    assert set(everything["sentence"]) >= {"The boy slept.", "The clever king slept."}
    with pytest.raises(ValueError, match="^Only 2 acceptable sentences .* where 3 are asked for: ask for fewer"):
        grammar.sample_sentences(3, seed=0, exclude=everything["sentence"][:10], grammatical_share=1)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_impossible_share_is_an_error(share):
    with pytest.raises(ValueError, match="grammatical_share must be between 0 and 1"):
        grammar.sample_sentences(10, seed=0, grammatical_share=share)


def test_negative_count_is_an_error():
    with pytest.raises(ValueError, match="must be at least 0, not -1"):
        grammar.sample_sentences(-1, seed=0)


@pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0, math.nan, {"x": 0.1, "y": 0.5}])
def test_impossible_rate_is_an_error(rate):
    with pytest.raises(ValueError, match="rate must be at least 0 and below 0.5"):
        grammar.flip_labels(table_of(3, 3).assign(source="x"), rate, seed=0)
