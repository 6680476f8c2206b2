"""The reader of CoLA-shaped files, by hand and on CoLA itself; the generated corpus and its exact disagreement."""

import csv
import hashlib
import os
import shlex

import pandas as pd
import pytest

from conftest import make_data, tiny
from nondecoupling.study import folders
from nondecoupling.study.profile import Columns, Data
from nondecoupling.study.study import load_study, parse_overrides
from nondecoupling.task import annotators, corpus, grammar, hub
from nondecoupling.workflow import __main__ as cli
from nondecoupling.workflow import executor, graph, notebooks

AWKWARD = [
    ("s1", 1, "", 'He said "hello" and left.'),
    ("s1", 0, "*", "Don't 'quote' \"me."),
    ("s2", 1, "??", "“Curly” – and a 'single one; commas, too"),
    ("s2", 0, "", '"'),
    ("a, b", 1, "", "Backslash \\ and trailing space "),
]

# Rows, bytes' sha256 and acceptable sentences of CoLA 1.1's public files.
COLA = {
    "in_domain_train.tsv": (8551, "f320a10f92d3bce6b29152fde322a362eac39238e50d8de0c8815457fdf4fc12", 0.7044),
    "in_domain_dev.tsv": (527, "77176f6a03faa5a1c4f23c69971fc1bff565931112fb65af47b2d6e24b7f42f7", 0.6926),
    "out_of_domain_dev.tsv": (516, "201b9c57b2a20f1282242eec0ed8995729e3be19c29a46c047b3727338836c05", 0.6860),
}

SMALL = Data(source="generated", folder=None, expect="any", train_size=300, dev_size=110, disagreement=0.1)
RATES = dict(zip(grammar.PHENOMENA, [0.0, 0.02, 0.05, 0.1, 0.125, 0.2, 0.25, 0.3, 0.4, 0.45, 0.49], strict=True))


def in_folder(folder, **settings):
    return SMALL.model_copy(update={"folder": str(folder), **settings})


def write(folder, split="train", text="a\t1\t\tFine.\nb\t0\t*\tFine not.\n"):
    path = folder / corpus.FILES[split]
    path.write_bytes(text.encode())
    return path


# One file


def test_awkward_sentences_survive_a_round_trip(tmp_path):
    table = pd.DataFrame(AWKWARD, columns=corpus.COLUMNS)
    corpus.write_tsv(table, tmp_path / "t.tsv")
    pd.testing.assert_frame_equal(corpus.read_file(tmp_path / "t.tsv"), table)
    lines = (tmp_path / "t.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == 's1\t1\t\tHe said "hello" and left.'  # as in CoLA's files: nothing quoted or escaped


def test_what_the_csv_module_reads_without_quoting_is_what_is_read(tmp_path):
    path = write(tmp_path, text='x\t1\t\t"One\ny\t0\t*\ttwo" three\n')
    with path.open(newline="") as lines:
        expected = [row[3] for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert corpus.read_file(path)["sentence"].tolist() == expected == ['"One', 'two" three']


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_line_ends_do_not_matter(tmp_path, end):
    path = write(tmp_path, text=f"x\t1\t\tOne.{end or chr(10)}y\t0\t*\tTwo.{end}")
    assert corpus.read_file(path)["sentence"].tolist() == ["One.", "Two."]


@pytest.mark.parametrize(
    "line",
    ["x\t1\tThree columns.", "x\t1\t\tFive\tcolumns.", "x\t2\t\tLabel two.", "x\tmaybe\t\tWord.", "x\t1\t\t ", ""],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line):
    path = write(tmp_path, text=f"a\t1\t\tFine.\n{line}\nb\t0\t*\tFine not.\n")
    words = "expected source, label 0 or 1, mark, sentence|the label is '(2|maybe)'|there is no sentence"
    with pytest.raises(ValueError, match=f"line 2: ({words})") as caught:
        corpus.read_file(path)
    assert str(path) in str(caught.value)


def test_an_empty_file_is_named(tmp_path):
    path = write(tmp_path, text="")
    with pytest.raises(ValueError, match=f"{path} is empty"):
        corpus.read_file(path)


# A folder


@pytest.mark.parametrize("missing", ["train", "dev"])
def test_a_missing_file_is_named(tmp_path, missing):
    write(tmp_path, "dev" if missing == "train" else "train")
    with pytest.raises(FileNotFoundError, match=corpus.FILES[missing]):
        corpus.load_corpus(tmp_path)


def test_the_out_of_domain_file_is_optional(tmp_path):
    write(tmp_path, "train")
    write(tmp_path, "dev")
    assert corpus.load_corpus(tmp_path)["split"].unique().tolist() == ["train", "dev"]
    write(tmp_path, "dev_out")
    table = corpus.load_corpus(tmp_path)
    assert table["split"].tolist() == ["train", "train", "dev", "dev", "dev_out", "dev_out"]
    assert table["label"].tolist() == [1, 0] * 3


def test_a_split_with_one_label_is_refused(tmp_path):
    write(tmp_path, "train")
    write(tmp_path, "dev", "a\t1\t\tFine.\nb\t1\t\tFiner.\n")
    with pytest.raises(ValueError, match="every sentence of 'dev' has label 1"):
        corpus.load_corpus(tmp_path)


def test_description_by_hand(hand_made):
    summary = corpus.describe_corpus(hand_made)
    assert summary.index.tolist() == ["train", "dev"]
    assert summary["sentences"].tolist() == [3, 2]
    assert summary["acceptable"].tolist() == [2, 1]
    assert summary["share_acceptable"].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert summary["majority_reward"].tolist() == pytest.approx([1 / 3, 0])


@pytest.mark.parametrize(("labels", "reward"), [([1, 1, 1, 0], 0.5), ([0, 0, 0, 1], 0.5), ([0, 1], 0), ([0], 1)])
def test_majority_reward_by_hand(labels, reward):
    assert corpus.majority_reward(pd.Series(labels)) == reward


def test_the_training_subset_is_fixed_and_of_training_sentences(hand_made):
    first, again = corpus.fixed_subset(hand_made, "train", 2), corpus.fixed_subset(hand_made, "train", 2)
    pd.testing.assert_frame_equal(first, again)
    assert len(first) == first["sentence"].nunique() == 2
    assert set(first["split"]) == {"train"}
    assert sorted(corpus.fixed_subset(hand_made, "train", 99)["sentence"]) == [
        "One sleeps.",
        "Two sleep.",
        "Two sleeps.",
    ]


# The generated corpus


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    corpus.generate_corpus(SMALL, 7, folder)
    return folder


def flips(table):
    """Which labels are not the grammar's verdict."""
    return (table["mark"] == "*") == (table["label"] == 1)


def test_each_split_has_its_size_and_exactly_the_disagreement_asked_for(generated):
    table = corpus.load_corpus(generated)
    assert table["split"].value_counts().to_dict() == {"train": 300, "dev": 110}
    counts = table.groupby(["split", "source"]).size()
    pd.testing.assert_series_equal(
        flips(table).groupby([table["split"], table["source"]]).sum(), (0.1 * counts).round().astype(int)
    )
    assert set(table.loc[flips(table), "label"]) == {0, 1}


def test_each_phenomenon_has_exactly_its_own_disagreement_in_each_split(tmp_path):
    corpus.generate_corpus(SMALL.model_copy(update={"disagreement": RATES, "train_size": 1100}), 7, tmp_path)
    table = corpus.load_corpus(tmp_path)
    counts = flips(table).groupby([table["split"], table["source"]]).agg(["size", "sum"])
    assert len(counts) == 2 * len(RATES)
    for (split, source), (size, flipped) in counts.iterrows():
        assert flipped == round(RATES[source] * size), (split, source)
        assert size >= (90 if split == "train" else 5)


def test_no_sentence_occurs_twice(generated):
    table = corpus.load_corpus(generated)
    assert table["sentence"].is_unique


def test_without_disagreement_every_label_is_the_grammars(tmp_path):
    corpus.generate_corpus(SMALL.model_copy(update={"disagreement": 0.0}), 7, tmp_path)
    table = corpus.load_corpus(tmp_path)
    assert ((table["mark"] == "") == (table["label"] == 1)).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(generated, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, seed in ((again, 7), (other, 8)):
        folder.mkdir()
        corpus.generate_corpus(SMALL, seed, folder)
    for name in ("in_domain_train.tsv", "in_domain_dev.tsv"):
        assert (again / name).read_bytes() == (generated / name).read_bytes()
        assert (other / name).read_bytes() != (generated / name).read_bytes()
    one, two = corpus.load_corpus(generated), corpus.load_corpus(other)
    assert len(set(one["sentence"]) & set(two["sentence"])) < 0.2 * len(one)
    assert (flips(one) != flips(two)).any()


def test_the_order_in_which_rates_are_written_changes_no_label(tmp_path):
    """They name the same study."""
    tables = []
    for name, rates in (("one", RATES), ("other", dict(reversed(RATES.items())))):
        (tmp_path / name).mkdir()
        corpus.generate_corpus(SMALL.model_copy(update={"disagreement": rates}), 7, tmp_path / name)
        tables.append(corpus.load_corpus(tmp_path / name))
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (RATES | {"tence": 0.1}, "'tence' is no phenomenon of the grammar"),
        ({source: rate for source, rate in RATES.items() if source != "wh"}, "'wh' is missing"),
        ({}, "'agreement' is missing"),
    ],
)
def test_a_phenomenon_that_is_unknown_or_left_out_is_named(rates, words):
    with pytest.raises(ValueError, match=words) as caught:
        annotators.disagreement_by_source(SMALL.model_copy(update={"disagreement": rates}))
    assert "it must name each of agreement, determiner," in str(caught.value)


# The corpus that stages read


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The corpus of seed 1 of the tiny study with some settings changed, after chapter 1."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))

    def read(changes):
        study = tiny(changes)
        return make_data(study, 1), corpus.load_checked_corpus(study, 1)

    return read


@pytest.mark.parametrize("rates", [0.2, RATES])
def test_truth_and_agreement_are_known_of_every_generated_sentence(read, rates):
    folder, table = read({"data.disagreement": rates})
    assert folder.parts[-2:] == ("seed1", "data")
    assert (table["truth"] == table["mark"].map({"": 1, "*": 0})).all()
    expected = [1 - (rates if rates == 0.2 else rates[source]) for source in table["source"]]
    assert table["agreement"].tolist() == expected
    assert flips(table).any()
    true = annotators.with_true_labels(table)
    assert (true["label"] == table["truth"]).all()
    assert (true["agreement"] == 1.0).all()


def test_a_study_of_true_labels_has_them_everywhere(read):
    """Also where its base is measured."""
    _, table = read({"data.labels": "truth"})
    assert not flips(table).any()
    assert (table["agreement"] == 1.0).all()


def test_nobody_knows_truth_and_agreement_of_real_sentences(read, tmp_path):
    for split in ("train", "dev"):
        write(tmp_path, split)
    folder, table = read({"data.folder": str(tmp_path)})
    assert folder == folders.results_root() / "tiny" / "data"  # once
    assert table["truth"].isna().all()
    assert table["agreement"].isna().all()
    assert table["agreement"].dtype == float


def test_seeds_of_a_study_have_other_sentences_and_each_its_own(read):
    _, table = read({})
    make_data(tiny(), 0)
    other = corpus.load_checked_corpus(tiny(), 0)
    assert table["sentence"].is_unique
    assert len(set(table["sentence"]) & set(other["sentence"])) < 0.2 * len(table)


def test_more_disagreement_changes_labels_and_no_sentence(generated, tmp_path):
    corpus.generate_corpus(SMALL.model_copy(update={"disagreement": 0.3}), 7, tmp_path)
    few, many = corpus.load_corpus(generated), corpus.load_corpus(tmp_path)
    assert (few["sentence"] == many["sentence"]).all()
    assert (few["mark"] == many["mark"]).all()
    assert (few["label"] != many["label"]).any()


# CoLA itself


@pytest.mark.parametrize("name", COLA)
def test_cola_has_the_rows_and_bytes_that_are_pinned(cola, name):
    rows, digest, share = COLA[name]
    assert hashlib.sha256((cola / name).read_bytes()).hexdigest() == digest
    table = corpus.read_file(cola / name)
    assert len(table) == rows
    assert round(table["label"].mean(), 4) == share


def test_colas_majority_answer_earns_what_the_paper_reports_for_rl(cola):
    summary = corpus.describe_corpus(corpus.load_corpus(cola))
    assert summary.loc["dev", "acceptable"] == 365
    assert round(summary.loc["dev", "majority_reward"], 4) == 0.3852
    both = summary.loc[["dev", "dev_out"]].sum()
    assert (both["acceptable"], both["sentences"]) == (719, 1043)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "in_domain_dev.tsv"
    path.write_bytes(b"x\t1\t\tFa\xe7ade.\n")
    with pytest.raises(ValueError, match=r"in_domain_dev\.tsv is not UTF-8"):
        corpus.read_file(path)


# CoLA, from its files and from GLUE


def test_cola_itself_is_what_is_expected(cola, tmp_path):
    data = Data(source="hub", folder=str(cola), expect="cola")
    assert corpus.collect_corpus(data, 0, tmp_path) == cola


def test_a_changed_file_is_named_with_both_hashes(cola, tmp_path):
    for name in corpus.COLA_SHA256:
        (tmp_path / name).write_bytes((cola / name).read_bytes())
    changed = tmp_path / "in_domain_dev.tsv"
    changed.write_bytes(changed.read_bytes() + b"x\t1\t\tOne more.\n")
    found = hashlib.sha256(changed.read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=f"in_domain_dev.tsv has sha256 {found}, but CoLA 1.1's is 77176f6a.*expect=any"
    ):
        corpus.collect_corpus(Data(source="hub", folder=str(tmp_path), expect="cola"), 0, tmp_path)
    assert corpus.collect_corpus(Data(source="hub", folder=str(tmp_path), expect="any"), 0, tmp_path) == tmp_path


@pytest.fixture
def glue(cola):
    """GLUE's copy of CoLA as far as is known here: its columns and row counts, in-domain sentences first."""
    table = corpus.load_corpus(cola)
    dev = pd.concat([table[table["split"] == "dev"], table[table["split"] == "dev_out"]])
    return {"train": table[table["split"] == "train"][["sentence", "label"]], "validation": dev[["sentence", "label"]]}


def test_glue_becomes_the_same_corpus_with_the_two_dev_sets_apart(glue, cola, tmp_path, monkeypatch):
    for split, table in glue.items():
        table.to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setattr(hub, "fetch_glue", lambda: {split: tmp_path / f"{split}.parquet" for split in glue})
    folder = corpus.collect_corpus(Data(source="hub", folder=None, expect="cola"), 0, tmp_path)
    found, expected = corpus.load_corpus(folder), corpus.load_corpus(cola)
    same = ["split", "sentence", "label"]
    pd.testing.assert_frame_equal(found[same], expected[same])


def test_glue_in_another_order_is_one_dev_set(glue, tmp_path):
    corpus.write_glue(glue | {"validation": glue["validation"].iloc[::-1]}, tmp_path)
    assert corpus.load_corpus(tmp_path)["split"].value_counts().to_dict() == {"train": 8551, "dev": 1043}


def test_glue_of_another_length_is_refused(glue, tmp_path):
    with pytest.raises(ValueError, match=r"cola/validation.*: 1042 rows, but CoLA's has 1043"):
        corpus.write_glue(glue | {"validation": glue["validation"].iloc[:-1]}, tmp_path)


# Another task: two named columns


def write_task(folder, split="train", text="sentence\tlabel\nIs it?\t1\nIt is.\t0\n"):
    (folder / f"{split}.tsv").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("dev", ['sentence\tlabel\n"So"?\t1\nSo.\t0\n', 'label\tsentence\n1\t"So"?\n0\tSo.\n'])
def test_two_named_columns_are_a_corpus(tmp_path, dev):
    write_task(tmp_path)
    write_task(tmp_path, "dev", dev)
    table = corpus.load_corpus(tmp_path)
    assert list(table) == ["split", *corpus.COLUMNS]
    assert table["sentence"].tolist() == ["Is it?", "It is.", '"So"?', "So."]
    assert table["label"].tolist() == [1, 0, 1, 0]
    assert table["split"].tolist() == ["train", "train", "dev", "dev"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Is it?\t1\nIt is.\t0\n", ["line 1", "'sentence' and 'label'", "'Is it?'"]),
        ("sentence,label\nIs it?,1\n", ["line 1", "separated by a tab"]),
        ("sentence\tlabel\nIs it?\t1\nIt is.\tso\n", ["line 3", "'so'", "1 or 0"]),
        ("sentence\tlabel\nIs\tit?\t1\n", ["line 2", "2 cells"]),
        ("sentence\tlabel\n\nIs it?\t1\n", ["line 2", "2 cells"]),
        ("sentence\tlabel\n \t1\n", ["line 2", "no sentence"]),
        ("", ["empty"]),
    ],
)
def test_faults_of_a_task_are_named_with_file_and_line(tmp_path, text, words):
    write_task(tmp_path)
    write_task(tmp_path, "dev", text)
    with pytest.raises(ValueError, match="dev.tsv") as caught:
        corpus.load_corpus(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_folder_without_files_says_which_it_may_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"in_domain_train.tsv and in_domain_dev.tsv, or train.tsv and dev.tsv"):
        corpus.load_corpus(tmp_path)


# The shapes in which corpora of acceptability are published

ROWS = [
    ("Plain.", 1),
    ('He said "stop" twice.', 0),
    ('"So," she said, "it is."', 1),
    ("A, comma; and 'that'", 0),
    ("It\u2019s “curly”, ünd 日本語。", 1),
    ("1997", 0),
]
PUBLISHED = pd.DataFrame(ROWS, columns=["sentence", "label"])
WORDS = PUBLISHED.assign(label=PUBLISHED["label"].map({1: "Acceptable", 0: "unacceptable"}))


def published(folder, table, train="train.tsv", dev="dev.tsv", **how):
    for name in (train, dev):
        table.to_csv(folder / name, index=False, **how)


def rucola(folder):
    table = PUBLISHED.rename(columns={"label": "acceptable"}).assign(error_type="0", detailed_source="Rusgram")
    for name in ("in_domain_train.csv", "in_domain_dev.csv", "out_of_domain_dev.csv"):
        table.reset_index(names="id").to_csv(folder / name, index=False)
    (folder / "test.csv").write_text("id,sentence\n")
    return {"sentence": "sentence", "label": "acceptable", "source": "detailed_source"}


def jcola(folder):
    table = PUBLISHED.assign(uid=range(6), source="Kuno (1973)", diacritic="g", phenomenon="binding")
    table = table.rename(columns={"sentence": "text"})
    for name in ("in_domain_train-v1.0.json", "in_domain_valid-v1.0.json", "out_of_domain_valid-v1.0.json"):
        table.to_json(folder / name, orient="records", lines=True, force_ascii=False)
    return {"sentence": "text"}


def glue_archive(folder):
    """As its archive is unpacked: CoLA's four columns under other names, a test set without labels, the originals."""
    for name in ("train.tsv", "dev.tsv"):
        corpus.write_tsv(PUBLISHED.assign(source="gj04", mark=""), folder / name)
    (folder / "test.tsv").write_text("index\tsentence\n0\tPlain.\n")
    (folder / "original").mkdir()


SHAPES = {
    "tsv as pandas quotes it": lambda folder: published(folder, PUBLISHED, sep="\t"),
    "tsv with every cell quoted": lambda folder: published(folder, PUBLISHED, sep="\t", quoting=csv.QUOTE_ALL),
    "tsv with words quoted": lambda folder: published(folder, PUBLISHED, sep="\t", quoting=csv.QUOTE_NONNUMERIC),
    "tsv without quotes": lambda folder: published(folder, PUBLISHED, sep="\t", quoting=csv.QUOTE_NONE, quotechar=None),
    "csv": lambda folder: published(folder, PUBLISHED, "train.csv", "validation.csv"),
    "csv with every cell quoted": lambda folder: published(
        folder, PUBLISHED, "train.csv", "dev.csv", quoting=csv.QUOTE_ALL
    ),
    "Excel's csv": lambda folder: published(
        folder, PUBLISHED, "train.csv", "dev.csv", encoding="utf-8-sig", lineterminator="\r\n"
    ),
    "Excel's tsv": lambda folder: published(folder, PUBLISHED, sep="\t", encoding="utf-8-sig", lineterminator="\r\n"),
    "labels as words": lambda folder: published(folder, WORDS, sep="\t"),
    "labels as fractions": lambda folder: published(folder, PUBLISHED.astype({"label": float}), sep="\t"),
    "labels as truth values": lambda folder: published(folder, PUBLISHED.astype({"label": bool}), sep="\t"),
    "RuCoLA": rucola,
    "JCoLA": jcola,
    "GLUE": glue_archive,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_corpus_is_read_as_it_was_written(shape, tmp_path):
    columns = SHAPES[shape](tmp_path) or {}
    (tmp_path / "notes.txt").write_text("not read")
    table = corpus.load_corpus(tmp_path, corpus.AS_PUBLISHED.model_copy(update={"columns": Columns(**columns)}))
    for _, found in table.groupby("split"):
        assert list(found[["sentence", "label"]].itertuples(index=False, name=None)) == ROWS
    splits = ["train", "dev", "dev_out"] if "CoLA" in shape else ["train", "dev"]
    assert table["split"].unique().tolist() == splits
    if shape in ("RuCoLA", "JCoLA", "GLUE"):
        assert set(table["source"]) == {{"RuCoLA": "Rusgram", "JCoLA": "Kuno (1973)", "GLUE": "gj04"}[shape]}


def test_cola_itself_is_read_without_quotes(cola):
    for path in sorted(cola.glob("*.tsv")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert corpus.read_file(path)["sentence"].tolist() == [line.split("\t")[3] for line in lines]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('sentence,label\n"Open,1\nIt is.,0\n', ["line 2", "2 cells"]),
        ("sentence,label\n" + "x" * 140_000 + ",1\n", ["field larger than field limit"]),
        ("sentence,label\nHm.,-1\n", ["line 2", "'-1'"]),  # a test set whose labels are kept back
        ("satz,urteil\nHm.,1\n", ["line 1", "'sentence' and 'label'", "data.columns="]),
        ("sentence,label,label\nHm.,1,0\n", ["line 1", "'label', 'label'"]),
    ],
)
def test_faults_of_a_csv_are_named(tmp_path, text, words):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=r"train\.csv") as caught:
        corpus.read_file(tmp_path / "train.csv")
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("lines", [True, False])
def test_json_is_lines_or_an_array_and_a_sentence_may_hold_any_character(tmp_path, lines):
    table = PUBLISHED.assign(sentence=PUBLISHED["sentence"] + "\u2028\x85[1]\x0c")
    for name in ("train.json", "dev.json"):
        table.to_json(tmp_path / name, orient="records", lines=lines, force_ascii=False, indent=None if lines else 2)
    found = corpus.load_corpus(tmp_path)
    assert found.loc[found["split"] == "dev", "sentence"].tolist() == table["sentence"].tolist()


@pytest.mark.parametrize("text", ["{", "[1]", "[]", "[[1]]", '{"sentence": "Hm."}\n{"label": 1}', "1"])
def test_json_that_holds_no_rows_is_named(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"train\.jsonl"):
        corpus.read_file(tmp_path / "train.jsonl")


def test_two_files_of_one_split_are_named(tmp_path):
    published(tmp_path, PUBLISHED, sep="\t")
    write(tmp_path)
    with pytest.raises(ValueError, match=r"holds in_domain_train\.tsv and train\.tsv; leave one"):
        corpus.load_corpus(tmp_path)


def test_a_pipe_is_no_file(tmp_path):
    published(tmp_path, PUBLISHED, sep="\t")
    (tmp_path / "dev.tsv").unlink()
    os.mkfifo(tmp_path / "dev.tsv")
    with pytest.raises(FileNotFoundError, match="no file of the split 'dev'"):
        corpus.load_corpus(tmp_path)


def test_dev_sentences_that_are_trained_on_are_counted(tmp_path):
    write_task(tmp_path, "train", "sentence\tlabel\nOne.\t1\nTwo.\t0\nThree.\t1\n")
    write_task(tmp_path, "dev", "sentence\tlabel\nOne.\t1\nTwo.\t1\nFour.\t0\n")
    train, dev = corpus.remarks(tmp_path, in_folder(tmp_path))
    assert train == "train: 3 sentences of train.tsv"
    assert dev == (
        "dev: 3 sentences of dev.tsv, of which 2 are also trained on, 1 with the other label: "
        'kept (SET="data.overlap=leave_out" leaves them out)'
    )
    _, left = corpus.remarks(tmp_path, in_folder(tmp_path, overlap="leave_out"))
    assert left == dev.partition("kept")[0] + "left out"


def test_dev_sentences_that_are_trained_on_are_left_out_where_the_study_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    folder = tmp_path / "task"
    folder.mkdir()
    write_task(folder, "train", "sentence\tlabel\nOne.\t1\nTwo.\t0\nThree.\t1\n")
    write_task(folder, "dev", "sentence\tlabel\nOne.\t0\nTwo.\t0\nFour.\t0\nFive.\t1\n")
    for overlap, expected in {"keep": ["One.", "Two.", "Four.", "Five."], "leave_out": ["Four.", "Five."]}.items():
        study = load_study("tiny", data=str(folder), overrides={"data.overlap": overlap})
        metrics = folders.read_json(make_data(study) / folders.METRICS)
        assert metrics["evaluation"]["dev"]["n"] == len(expected)
        table = corpus.load_checked_corpus(study, 0)
        assert table.loc[table["split"] == "dev", "sentence"].tolist() == expected
        assert (table["split"] == "train").sum() == 3
    # Before a kernel starts it is said, and refused where nothing is left to measure on.
    monkeypatch.setattr(executor, "run_make", lambda *_, **__: 0)
    words = ["reproduce", "--profile=tiny", f"--data={folder}", "--seeds=1", "--target"]
    cli.main([*words, str(tmp_path / "results" / load_study("tiny", data=str(folder)).name / "claims.json")])
    assert "of which 2 are also trained on, 1 with the other label: kept (SET=" in capsys.readouterr().out
    write_task(folder, "dev", "sentence\tlabel\nOne.\t0\nFour.\t0\n")
    assert cli.main(["reproduce", "--profile=tiny", f"--data={folder}", "--set=data.overlap=leave_out"]) == 1
    assert "every sentence of 'dev' has label 0, without those that are also trained on" in capsys.readouterr().err


def test_cola_shares_sentences_between_its_files(cola):
    found = corpus.remarks(cola, in_folder(cola))
    assert "of which 6 are also trained on, 2 with the other label" in found[1]
    assert "of which 12 are also trained on, 0 with the other label" in found[2]
    left_out = corpus.AS_PUBLISHED.model_copy(update={"overlap": "leave_out"})
    left = corpus.load_corpus(cola, left_out)["split"].value_counts()
    assert left.to_dict() == {"train": 8551, "dev": 527 - 6, "dev_out": 516 - 12}


def test_data_that_is_edited_while_a_study_runs_is_named(tmp_path, monkeypatch, capsys):
    """Before a recipe starts its kernel, or between that and the kernel's own look."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    folder = tmp_path / "task"
    folder.mkdir()
    published(folder, PUBLISHED, sep="\t")
    study = load_study("tiny", data=str(folder))
    root, recipes = folders.study_folder(study), []

    def make(command, _):
        [*_, goal] = (root / executor.RULES).read_text().split("seed0/sft/metrics.json:")[1].splitlines()[:2]
        recipes.append(shlex.split(goal)[4:])  # after the launcher, and python -m nondecoupling.workflow
        return 0

    monkeypatch.setattr(executor, "run_make", make)
    cli.main(["reproduce", "--profile=tiny", f"--data={folder}", f"--target={root / 'claims.json'}"])
    [recipe], executed = recipes, []

    def fail(begun, *_):
        executed.append(begun.name)
        (folder / "dev.tsv").write_text("sentence\tlabel\nOne.\t0\nTwo.\t1\n")
        raise RuntimeError("03_sft.ipynb failed: FileNotFoundError: needs the finished run elsewhere")

    monkeypatch.setattr(notebooks, "execute", fail)
    capsys.readouterr()
    for _ in range(2):
        assert cli.main(recipe) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {folder / 'dev.tsv'} has changed since the study '{study.name}' began, all of")
        assert said.endswith("the same command begins a study of its own.\n")
        assert said.count("\n") == 1
    assert executed == [study.name]
    (folder / "dev.tsv").unlink()
    (folder / "validation.csv").write_text("sentence,label\nOne.,0\nTwo.,1\n")
    assert cli.main(recipe) == 1
    assert f"{folder / 'dev.tsv'} and {folder / 'validation.csv'} have changed since" in capsys.readouterr().err
    # The same command begins a study of its own, and says why the other's runs are not in it.
    cli.main(["reproduce", "--profile=tiny", f"--data={folder}"])
    said = f"have changed since the study '{study.name}', whose runs stay where they are; this is a study of its own"
    assert said in capsys.readouterr().out
    assert root.exists()


def test_a_model_that_is_edited_while_a_study_runs_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("one")
    study = load_study("tiny", model=str(folder))
    graph.write_settings(study, [graph.run_part(study, "base", 0)], [0])
    (folder / "model.safetensors").write_text("two")
    words = ["run", "--run=sft", "--profile=tiny", f"--model={folder}", f"--begun={study.name}"]
    assert cli.main(words) == 1
    assert f"error: {folder / 'model.safetensors'} has changed since the study" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert cli.main(words) == 1
    assert f"{folder / 'model.safetensors'} is gone since the study" in capsys.readouterr().err


def test_columns_are_named_in_one_word_of_the_command_line():
    text = 'data.columns={"sentence":"the text","label":"acceptable"}'
    columns = load_study("nano", overrides=parse_overrides(text)).profile.data.columns
    assert columns == Columns(sentence="the text", label="acceptable")
    with pytest.raises(ValueError, match=r"unknown setting 'data\.columns\.lable' \(did you mean 'label'"):
        load_study("nano", overrides={"data.columns": {"lable": "x"}})


def test_files_that_are_not_read_change_no_studys_name(tmp_path):
    published(tmp_path, PUBLISHED, sep="\t")
    before = load_study("nano", data=str(tmp_path)).name
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "notes.tsv").write_text("x")
    assert load_study("nano", data=str(tmp_path)).name == before
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nSo.\t1\n")
    assert load_study("nano", data=str(tmp_path)).name != before


def test_a_corpus_that_cannot_be_read_is_refused_before_a_kernel_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(executor, "run_make", lambda *_, **__: pytest.fail("make was started"))
    published(tmp_path, PUBLISHED.rename(columns={"label": "acceptable"}), "train.csv", "dev.csv")
    assert cli.main(["reproduce", "--profile=tiny", f"--data={tmp_path}"]) == 1
    assert "train.csv, line 1: expected the column names 'sentence' and 'label'" in capsys.readouterr().err
