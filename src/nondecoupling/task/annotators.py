"""What annotators say about generated sentences, for any number of labels: known shares, and labels drawn from them.

A sentence's *truth* is the last label if the grammar accepts it, else the label of the phenomenon that it violates.
Annotators contradict it at the phenomenon's rate, and say the other labels then in known, unequal shares.
"""

import numpy as np
import pandas as pd

from nondecoupling.study.profile import Data
from nondecoupling.task import grammar
from nondecoupling.task.seeds import seed_of

SHARE = "share_"  # columns of a corpus that hold the share of annotators who say each label


def phenomena(data: Data) -> list[str]:
    """The phenomena of which sentences are drawn, in the grammar's order: all, or those that ``data.violations`` names.

    Raises ValueError where it names one that the grammar does not have.
    """
    named = grammar.PHENOMENA if data.violations is None else data.violations
    for wrong in sorted(set(named) - set(grammar.PHENOMENA)):
        raise ValueError(
            f"data.violations: '{wrong}' is no phenomenon of the grammar; there is {', '.join(grammar.PHENOMENA)}."
        )
    return [name for name in grammar.PHENOMENA if name in named]


def disagreement_by_source(data: Data) -> dict[str, float]:
    """The share of labels that annotators get wrong, by phenomenon that is drawn; ValueError if one is not named."""
    drawn = phenomena(data)
    if not isinstance(data.disagreement, dict):
        return dict.fromkeys(drawn, data.disagreement or 0.0)
    grammar.require_each_phenomenon(data.disagreement, "data.disagreement", drawn)
    # In the grammar's order, in which labels are drawn: the order that a user writes must not matter.
    return {source: data.disagreement[source] for source in drawn}


def truths(data: Data, table: pd.DataFrame) -> pd.Series:
    """The true label of each sentence of ``table`` (columns ``source, mark``)."""
    acceptable = table["mark"] == ""
    if data.violations is None:
        return acceptable.astype(int)
    return table["source"].map(data.violations).where(~acceptable, data.answers - 1).astype(int)


def label_shares(data: Data, table: pd.DataFrame) -> np.ndarray:
    """(sentences, labels) the share of annotators who give each label to each sentence of ``table``."""
    truth, rates = truths(data, table).to_numpy(), table["source"].map(disagreement_by_source(data)).to_numpy(float)
    wrong = np.array(data.contradictions or [[0.0, 1.0], [1.0, 0.0]])[truth]
    return np.eye(data.answers)[truth] * (1 - rates[:, None]) + wrong * rates[:, None]


def drawn_labels(data: Data, table: pd.DataFrame, seed: int) -> pd.Series:
    """A label for each sentence of ``table``, in the shares of `label_shares`, up to one sentence for each label.

    Among the sentences of one phenomenon and truth: which of them are contradicted, chance says.
    """
    shares, rng = label_shares(data, table), np.random.default_rng(seed)
    labels = np.empty(len(table), dtype=int)
    for _, rows in sorted(table.reset_index(drop=True).groupby(["source", "mark"]).indices.items()):
        ends = np.round(np.cumsum(shares[rows[0]]) * len(rows)).astype(int)
        labels[rng.permutation(rows)] = np.repeat(np.arange(data.answers), np.diff(ends, prepend=0))
    return pd.Series(labels, index=table.index)


def annotated(data: Data, table: pd.DataFrame, split: str, seed: int) -> pd.DataFrame:
    """``table`` with the labels that replication ``seed``'s annotators give to the sentences of ``split``."""
    seed = seed_of(f"{split} labels", seed)
    if data.answers == 2:
        return grammar.flip_labels(table, disagreement_by_source(data), seed=seed)
    return table.assign(label=drawn_labels(data, table, seed))


def with_known_shares(data: Data, corpus: pd.DataFrame) -> pd.DataFrame:
    """A generated ``corpus`` with the columns ``truth`` and ``agreement``, the share of the likeliest label.

    Of two labels these say it all; of more, ``share_<label>`` columns hold the share of each.
    """
    shares = label_shares(data, corpus)
    known = corpus.assign(truth=truths(data, corpus).astype("Int64"), agreement=shares.max(1))
    if data.answers == 2:
        return known
    return known.assign(**{f"{SHARE}{label}": share for label, share in enumerate(shares.T)})


def with_true_labels(corpus: pd.DataFrame) -> pd.DataFrame:
    """A corpus of known truth as annotators who never disagree would label it."""
    certain = {name: (corpus["truth"] == int(name.removeprefix(SHARE))).astype(float) for name in share_columns(corpus)}
    return corpus.assign(label=corpus["truth"].astype(int), agreement=1.0, **certain)


def share_columns(table: pd.DataFrame) -> list[str]:
    """The columns of ``table`` that hold shares of labels; none where there are two labels."""
    return [name for name in table if name.startswith(SHARE)]
