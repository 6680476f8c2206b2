"""CoLA-shaped corpora: one reader for CoLA's own files and for the generated ones, one table out."""

import csv
import io
from pathlib import Path

import pandas as pd

from nondecoupling import grammar
from nondecoupling.profile import Data

# CoLA 1.1's file names; the third is optional.
FILES = {"train": "in_domain_train.tsv", "dev": "in_domain_dev.tsv", "dev_out": "out_of_domain_dev.tsv"}
COLUMNS = ["source", "label", "mark", "sentence"]


def generate_corpus(data: Data, folder: Path) -> None:
    """Write the generated train and dev sets to ``folder`` as CoLA-shaped TSV files.

    Labels are the grammar's verdict, flipped for a share ``data.disagreement`` of sentences; the mark column keeps the
    verdict ("*" for unacceptable), as CoLA's keeps the author's. Train and dev share no sentence.
    """
    clean = grammar.sample_sentences(data.train_size + data.dev_size, seed=data.seed)
    splits = {"dev": clean.iloc[: data.dev_size], "train": clean.iloc[data.dev_size :]}
    for offset, (split, table) in enumerate(splits.items(), start=1):
        noisy = grammar.flip_labels(table, data.disagreement, seed=data.seed + offset)
        write_tsv(noisy, folder / FILES[split])


def write_tsv(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` in CoLA's format: source, label, mark, sentence; tabs, no header, no quoting."""
    table[COLUMNS].to_csv(path, sep="\t", header=False, index=False, quoting=csv.QUOTE_NONE)


def read_tsv(path: Path) -> pd.DataFrame:
    """Read one CoLA-shaped file as ``source, label (1 acceptable, 0 not), mark, sentence``.

    Raises ValueError with the file and line of the first row that is not of that shape.
    """
    rows = []
    try:
        lines = io.StringIO(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from None
    for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
        if len(row) != 4 or row[1] not in ("0", "1") or not row[3].strip():
            raise ValueError(
                f"{path}, line {number}: expected source, label 0 or 1, mark, sentence, separated by tabs, "
                f"but found {row!r}."
            )
        rows.append((row[0], int(row[1]), row[2], row[3]))
    if not rows:
        raise ValueError(f"{path} is empty; it should hold one sentence per line.")
    return pd.DataFrame(rows, columns=COLUMNS)


def load_corpus(folder: Path) -> pd.DataFrame:
    """All splits in ``folder`` as one table ``split, source, label, mark, sentence``.

    Raises FileNotFoundError naming the missing file, ValueError if train and dev share no label variety.
    """
    tables = []
    for split, name in FILES.items():
        path = folder / name
        if path.exists():
            tables.append(read_tsv(path).assign(split=split))
        elif split != "dev_out":
            raise FileNotFoundError(
                f"{path} is missing; a data folder holds CoLA's {FILES['train']} and {FILES['dev']}."
            )
    corpus = pd.concat(tables, ignore_index=True)
    for split, labels in corpus.groupby("split")["label"]:
        if labels.nunique() < 2:
            raise ValueError(
                f"{folder}: every sentence of '{split}' has label {labels.iloc[0]}; both labels are needed."
            )
    return corpus[["split", *COLUMNS]]


def describe_corpus(corpus: pd.DataFrame) -> pd.DataFrame:
    """Per split: sentences, share acceptable, and the reward of always giving the likelier label."""
    summary = corpus.groupby("split", sort=False)["label"].agg(sentences="size", acceptable="sum")
    summary["share_acceptable"] = summary["acceptable"] / summary["sentences"]
    summary["majority_reward"] = (2 * summary["share_acceptable"] - 1).abs()
    return summary


def majority_reward(labels: pd.Series) -> float:
    """Reward of the best constant answer, counted on ``labels`` (+1 right, -1 wrong)."""
    return abs(2 * float(labels.mean()) - 1)


def training_subset(corpus: pd.DataFrame, size: int) -> pd.DataFrame:
    """The fixed ``size`` training sentences on which every policy is measured besides dev."""
    train = corpus[corpus["split"] == "train"]
    return train.sample(min(size, len(train)), random_state=0).reset_index(drop=True)
