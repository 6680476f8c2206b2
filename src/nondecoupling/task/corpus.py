"""Corpora of acceptability: from a folder, from the hub or generated; one reader, one table out."""

import csv
import hashlib
import io
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nondecoupling.study import folders, provenance
from nondecoupling.study.inputs import data_files
from nondecoupling.study.profile import Columns, Data
from nondecoupling.study.study import Study
from nondecoupling.task import annotators, grammar, hub
from nondecoupling.task.seeds import seed_of

# CoLA 1.1's file names; the third is optional.
FILES = {"train": "in_domain_train.tsv", "dev": "in_domain_dev.tsv", "dev_out": "out_of_domain_dev.tsv"}
COLUMNS = ["source", "label", "mark", "sentence"]
USUAL = Columns()
AS_PUBLISHED = Data(source="hub", folder=None, expect="any")  # the usual columns, two labels, nothing left out
# What files say for the two labels, whatever the case.
LABELS = dict.fromkeys(("1", "1.0", "acceptable", "grammatical", "correct", "true", "yes"), 1) | dict.fromkeys(
    ("0", "0.0", "unacceptable", "ungrammatical", "incorrect", "false", "no"), 0
)
# The public CoLA 1.1, as its authors distribute it.
COLA_SHA256 = {
    "in_domain_train.tsv": "f320a10f92d3bce6b29152fde322a362eac39238e50d8de0c8815457fdf4fc12",
    "in_domain_dev.tsv": "77176f6a03faa5a1c4f23c69971fc1bff565931112fb65af47b2d6e24b7f42f7",
    "out_of_domain_dev.tsv": "201b9c57b2a20f1282242eec0ed8995729e3be19c29a46c047b3727338836c05",
}
GLUE_ROWS = {"train": 8551, "validation": 1043}
# GLUE's validation set does not say which sentences are in-domain; these 527, if it begins with them.
IN_DOMAIN = 527
IN_DOMAIN_SHA256 = "9847f1c624b4d52bf55239211922a1648a897d854585982482ffddee185d8303"


def collect_corpus(data: Data, seed: int, folder: Path) -> Path:
    """The folder that holds the study's TSV files: the user's own, else ``folder`` after they were written there.

    ``seed`` is the replication's, for the generated corpus.

    Raises ValueError naming the file and both hashes (or row counts) where ``data.expect`` is "cola" and it is not,
    ConnectionError where the hub is needed and cannot be reached.
    """
    if data.folder:
        if data.expect == "cola":
            check_cola(Path(data.folder))
        return Path(data.folder)
    if data.source == "hub":
        write_glue({split: pd.read_parquet(path) for split, path in hub.fetch_glue().items()}, folder)
    else:
        generate_corpus(data, seed, folder)
    return folder


def check_cola(folder: Path) -> None:
    """Raise ValueError unless every CoLA file in ``folder`` is CoLA 1.1's, byte for byte."""
    for path in data_files(folder).values():
        name, found = path.name, folders.sha256(path)
        expected = COLA_SHA256.get(name, found)  # a task of one's own has other names
        if found != expected:
            raise ValueError(
                f"{folder / name} has sha256 {found}, but CoLA 1.1's is {expected}; download it again, or set "
                f"data.expect=any for a corpus of your own."
            )


def write_glue(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write GLUE's copy of CoLA (columns ``sentence, label``) to ``folder`` as CoLA-shaped TSV files.

    The two dev sets are kept apart where the validation table begins with CoLA's in-domain sentences, in their order.
    """
    for split, rows in GLUE_ROWS.items():
        if len(tables[split]) != rows:
            raise ValueError(f"{hub.GLUE}, {hub.GLUE_FILES[split]}: {len(tables[split])} rows, but CoLA's has {rows}.")
    validation = tables["validation"]
    first = "\n".join(validation["sentence"].iloc[:IN_DOMAIN])
    apart = hashlib.sha256(first.encode()).hexdigest() == IN_DOMAIN_SHA256
    dev = {"dev": validation.iloc[:IN_DOMAIN], "dev_out": validation.iloc[IN_DOMAIN:]} if apart else {"dev": validation}
    for split, table in {"train": tables["train"], **dev}.items():
        write_tsv(table.assign(source="glue", mark=""), folder / FILES[split])


def generate_corpus(data: Data, seed: int, folder: Path) -> None:
    """Write replication ``seed``'s generated train and dev sets to ``folder`` as CoLA-shaped TSV files.

    Labels are the grammar's verdict, contradicted in a known share of the sentences of each phenomenon (`annotators`);
    the mark column keeps the verdict ("*" for unacceptable), as CoLA's the author's. Train and dev share no sentence.
    """
    if data.train_size is None or data.dev_size is None:
        raise ValueError("The generated corpus needs data.train_size and data.dev_size.")
    drawn = annotators.disagreement_by_source(data)
    clean = grammar.sample_sentences(data.train_size + data.dev_size, seed=seed_of("sentences", seed), phenomena=drawn)
    for split, table in {"dev": clean.iloc[: data.dev_size], "train": clean.iloc[data.dev_size :]}.items():
        write_tsv(annotators.annotated(data, table, split, seed), folder / FILES[split])


def write_tsv(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` in CoLA's format: source, label, mark, sentence; tabs, no header, no quoting."""
    table[COLUMNS].to_csv(path, sep="\t", header=False, index=False, quoting=csv.QUOTE_NONE)


def read_rows(path: Path) -> list[list[str]]:
    """The cells of a file of JSON, of comma-separated or of tab-separated values, a JSON object's keys first.

    Raises ValueError with the file where it is empty, no text in UTF-8, or no such file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel puts a mark before the first letter
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; it should hold one sentence per line.")
    try:
        if path.suffix.startswith(".json"):
            objects = json_objects(text)
            names = list(objects[0])
            return [names, *([str(row[name]) for name in names] for row in objects)]
        return parsed(text, ",") if path.suffix == ".csv" else parsed_tabs(text)
    except (csv.Error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error!s:.200}.") from None


def json_objects(text: str) -> list[dict[str, Any]]:
    """The objects in ``text``: one to a line, or all in an array. A sentence may hold what ends a line elsewhere."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def parsed(text: str, delimiter: str, quoting: Any = csv.QUOTE_MINIMAL) -> list[list[str]]:
    """The cells of ``text``; a blank line has none, and is left out where it is the last."""
    return list(csv.reader(io.StringIO(text.rstrip("\n"), newline=""), delimiter=delimiter, quoting=quoting))


def parsed_tabs(text: str) -> list[list[str]]:
    """The cells of tab-separated ``text``, whose quotation marks are text unless a program put them around cells.

    It did if writing the cells down with quotes gives the same text again. CoLA's own files have none.
    """
    try:
        quoted = parsed(text, "\t")
    except csv.Error:
        quoted = []
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL):
        again = io.StringIO()
        numbers = quoting == csv.QUOTE_NONNUMERIC
        rows = [[int(cell) if numbers and cell in ("0", "1") else cell for cell in row] for row in quoted]
        csv.writer(again, delimiter="\t", quoting=quoting, lineterminator="\n").writerows(rows)
        if again.getvalue().rstrip("\n") == text.rstrip("\n"):
            return quoted
    return parsed(text, "\t", csv.QUOTE_NONE)


def read_file(path: Path, columns: Columns = USUAL, answers: int = 2) -> pd.DataFrame:
    """Read one file of a corpus as ``source, label (1 acceptable, 0 not), mark, sentence``.

    It has a header with the names that ``columns`` says (and others, which are not read), or is of CoLA's shape, which
    has none. Labels are 1 and 0, or words (`LABELS`); numbers below ``answers`` where these are more. Raises ValueError
    with the file and line of the first fault.
    """
    header, *rows = read_rows(path)
    known = LABELS if answers == 2 else {str(label): label for label in range(answers)}
    if len(header) == 4 and header[1].lower() in known and columns.label not in header:
        header, rows, columns, first = COLUMNS, [header, *rows], USUAL, 1
        shape = "source, label 0 or 1, mark, sentence"
    else:
        first, shape = 2, f"{len(header)} cells as in its header"
    needed = [columns.sentence, columns.label, *([columns.source] if columns.source != USUAL.source else [])]
    if any(header.count(name) != 1 for name in needed):
        separated = {".tsv": ", separated by a tab", ".csv": ", separated by a comma"}.get(path.suffix, "")
        raise ValueError(
            f"{path}, line 1: expected the column names {' and '.join(map(repr, needed))}{separated}, but found "
            f'{header!r}; SET=\'data.columns={{"sentence":"...","label":"..."}}\' says how they are called.'
        )
    found = []
    for number, row in enumerate(rows, start=first):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: expected {shape}, but found {row!r}.")
        cells = dict(zip(header, row, strict=True))
        label = known.get(cells[columns.label].strip().lower())
        if label is None:
            words = f"the label is {cells[columns.label]!r}, but must be 1 or 0, or a word such as 'acceptable'"
            raise ValueError(f"{path}, line {number}: {words}.")
        if not cells[columns.sentence].strip():
            raise ValueError(f"{path}, line {number}: there is no sentence.")
        found.append((cells.get(columns.source, ""), label, cells.get("mark", ""), cells[columns.sentence]))
    return pd.DataFrame(found, columns=COLUMNS)


def load_corpus(folder: Path, data: Data = AS_PUBLISHED) -> pd.DataFrame:
    """All splits in ``folder``, read as ``data`` says, as one table ``split, source, label, mark, sentence``.

    Where ``data.overlap`` is "leave_out" the other splits are without the sentences of train.
    Raises FileNotFoundError where a split is missing, ValueError if all sentences of one have the same label.
    """
    files = data_files(folder)
    for split in ("train", "dev"):
        if split not in files:
            raise FileNotFoundError(
                f"{folder} has no file of the split '{split}'; a corpus is in_domain_train.tsv and in_domain_dev.tsv, "
                f"or train.tsv and dev.tsv, or the same as csv or json."
            )
    tables = {split: read_file(path, data.columns, data.answers) for split, path in files.items()}
    corpus = pd.concat([table.assign(split=split) for split, table in tables.items()])
    if data.overlap == "leave_out":
        corpus = corpus[~also_trained_on(corpus)]
    for split in files:
        labels = corpus.loc[corpus["split"] == split, "label"]
        if labels.nunique() < 2:
            said = f"every sentence of '{split}' has label {labels.iloc[0]}" if len(labels) else f"'{split}' is empty"
            left = ", without those that are also trained on" if data.overlap == "leave_out" else ""
            raise ValueError(f"{folder}: {said}{left}; both labels are needed.")
    return corpus[["split", *COLUMNS]].reset_index(drop=True)


def also_trained_on(corpus: pd.DataFrame) -> pd.Series:
    """Which rows of the other splits have a sentence of train."""
    train = corpus["split"] == "train"
    return ~train & corpus["sentence"].isin(corpus.loc[train, "sentence"])


def remarks(folder: Path, data: Data) -> list[str]:
    """Where each split was read, how many of its sentences are also trained on, and what ``data`` does with those."""
    corpus = load_corpus(folder, data.model_copy(update={"overlap": "keep"}))
    label_of, lines = corpus[corpus["split"] == "train"].set_index("sentence")["label"], []
    for split, path in data_files(folder).items():
        line = f"{split}: {(corpus['split'] == split).sum():,} sentences of {path.name}"
        known = corpus[also_trained_on(corpus) & (corpus["split"] == split)]
        if len(known):
            other = sum((label_of.loc[[s]] != label).all() for s, label in known[["sentence", "label"]].to_numpy())
            done = "left out" if data.overlap == "leave_out" else 'kept (SET="data.overlap=leave_out" leaves them out)'
            line += f", of which {len(known)} are also trained on, {other} with the other label: {done}"
        lines.append(line)
    return lines


def publish_corpus(study: Study, seed: int, partial: Path, folder: Path, started: datetime) -> Path:
    """Publish the data run, whose sentences are in ``folder``, from its ``partial`` folder; returns the result's."""
    data = study.profile.data
    evaluation = {
        str(split): {"n": int(row.sentences), "majority_reward": row.majority_reward}
        for split, row in describe_corpus(load_corpus(folder, data)).iterrows()
    }
    hashes = {path.name: folders.sha256(path) for path in data_files(folder).values()}
    root, run = folders.study_folder(study), study.run("data")
    provenance.write_metrics(root, partial, study, run, seed, started, evaluation, {}, data_sha256=hashes)
    return folders.publish(partial)


def load_checked_corpus(study: Study, seed: int) -> pd.DataFrame:
    """The corpus of replication ``seed`` with the columns ``truth`` (by the grammar's verdict) and ``agreement``.

    The agreement is q(x), the probability of a sentence's likelier label (of more than two labels there are the
    probabilities of all, see `annotators.with_known_shares`). Both are missing where nobody knows them. Labels are the
    truth where the study says so. Raises FileNotFoundError if the data run is not finished, ValueError if its files are
    not those that it described.
    """
    data, run = study.profile.data, folders.run_folder(folders.study_folder(study), study.run("data"), seed)
    described = folders.read_json(folders.require_complete(run, "Loading the corpus") / folders.METRICS)
    folder = Path(data.folder) if data.folder else run
    for name, expected in described["provenance"]["data_sha256"].items():
        found = folders.file_hashes(folder, name).get(name)
        if found != expected:
            raise ValueError(f"{folder / name} has sha256 {found}, but 01_data saw {expected}; run 01_data again.")
    corpus = load_corpus(folder, data)
    if not data.generated:
        return corpus.assign(truth=pd.Series(pd.NA, index=corpus.index, dtype="Int64"), agreement=np.nan)
    corpus = annotators.with_known_shares(data, corpus)
    return annotators.with_true_labels(corpus) if data.labels == "truth" else corpus


def describe_corpus(corpus: pd.DataFrame) -> pd.DataFrame:
    """Per split: sentences, share acceptable (the last label), and the reward of always giving the commonest label."""
    said_fine = corpus["label"] == corpus["label"].max()
    summary = said_fine.groupby(corpus["split"], sort=False).agg(sentences="size", acceptable="sum")
    summary["share_acceptable"] = summary["acceptable"] / summary["sentences"]
    summary["majority_reward"] = corpus.groupby("split", sort=False)["label"].agg(majority_reward)
    return summary


def majority_reward(labels: pd.Series) -> float:
    """Reward of the best constant answer, counted on ``labels`` (+1 right, -1 wrong)."""
    return 2 * float(labels.value_counts(normalize=True).max()) - 1


def fixed_subset(corpus: pd.DataFrame, split: str, size: int | None) -> pd.DataFrame:
    """The same ``size`` sentences of ``split`` for every policy (None: all); the index counts rows of the split."""
    table = corpus[corpus["split"] == split].reset_index(drop=True)
    return table if size is None else table.sample(min(size, len(table)), random_state=0)
