"""What a policy does on given sentences: exact label probabilities, sampled and greedy answers, and their metrics."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax, logsumexp, rel_entr
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nondecoupling.study.folders import answers_file
from nondecoupling.study.profile import Evaluation, Profile, Prompt
from nondecoupling.study.results import label_log_probabilities, likelier_labels, logp_columns
from nondecoupling.task.annotators import share_columns
from nondecoupling.task.corpus import fixed_subset, majority_reward
from nondecoupling.task.prompts import (
    answer_texts,
    parse_robust,
    parse_strict,
    prompt_ids,
    response_ids,
    responses,
    reward,
)
from nondecoupling.task.seeds import seed_of
from nondecoupling.training.generation import Prefix, batches

# Columns of a corpus that answers keep, besides the shares of more than two labels.
OF_A_SENTENCE = ["sentence", "label", "source", "truth", "agreement"]

Measured = tuple[dict[str, dict[str, float]], dict[str, pd.DataFrame]]  # by split: metrics, and a row per sentence


def evaluation_tables(corpus: pd.DataFrame, evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """The sentences on which finished policies are measured: dev splits whole, and a fixed part of train."""
    sizes = {"dev": None, "dev_out": None, "train": evaluation.train_size}
    return {
        split: fixed_subset(corpus, split, sizes[split]).reset_index(drop=True)
        for split in evaluation.splits
        if (corpus["split"] == split).any()
    }


def measure_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Profile,
    seed: int,
    tables: dict[str, pd.DataFrame],
    references: dict[str, Path],
) -> Measured:
    """Metrics and answers of a policy on each of ``tables``; ``references`` are folders of runs to take KL from."""
    response_tokens = tuple(len(response_ids(tokenizer, text)) for text in responses(settings.prompt))
    metrics, answers = {}, {}
    for split, table in tables.items():
        answers[split] = predict(model, tokenizer, settings.prompt, table, settings.evaluation.batch_size, seed)
        # A table may hold some of the split's sentences only; its index says which.
        known = {
            name: pd.read_parquet(folder / answers_file(split)).iloc[table.index] for name, folder in references.items()
        }
        metrics[split] = summarise(answers[split], settings.prompt, response_tokens, known)
    return metrics, answers


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    table: pd.DataFrame,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """The policy's answers to every sentence of ``table``, one row each.

    Columns `OF_A_SENTENCE`, as far as ``table`` has them, and ``logp_acceptable, logp_unacceptable, sampled, greedy``
    (with more than two answers, a ``logp_<label>`` for each): log p of the whole response with its end token (nats),
    and one answer sampled at temperature 1 and one greedy as text. Sampling has a generator of its own, seeded by the
    replication's ``seed``: measuring never disturbs training, and all policies of a replication share the draws.
    """
    was_training = model.training
    model.eval()
    rows = prompt_ids(tokenizer, prompt, table["sentence"])
    answers = [response_ids(tokenizer, text) for text in responses(prompt)]
    logp: dict[str, list[float]] = {name: [] for name in logp_columns(len(answers))}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed_of("evaluation", seed))
    sampled, greedy = [], []
    for batch in batches(rows, batch_size):
        prefix = Prefix(model, batch, tokenizer.pad_token_id)
        for of_answer, answer in zip(logp.values(), answers, strict=True):
            of_answer += prefix.log_probability(answer).tolist()
        sampled += prefix.answers(tokenizer.eos_token_id, prompt.max_new_tokens, generator=generator)
        greedy += prefix.answers(tokenizer.eos_token_id, prompt.max_new_tokens, greedy=True)
    model.train(was_training)
    return (
        table[[*(column for column in OF_A_SENTENCE if column in table), *share_columns(table)]]
        .assign(
            **dict(sorted(logp.items())),
            sampled=answer_texts(tokenizer, sampled),
            greedy=answer_texts(tokenizer, greedy),
        )
        .reset_index(drop=True)
    )


def outcomes(predictions: pd.DataFrame) -> np.ndarray:
    """(sentences, K + 1) probabilities of the K answers, and of anything else."""
    labels = np.exp(label_log_probabilities(predictions))
    return np.column_stack([labels, np.clip(1 - labels.sum(1), 0, None)])


def mean_outcome_kl(predictions: pd.DataFrame, reference: pd.DataFrame) -> float:
    """E_x KL(policy || reference) in nats over `outcomes`.

    The KL over whole answers is at least this, and equal to it where the two policies word "anything else" alike.
    """
    tiny = np.finfo(float).tiny
    p, q = outcomes(predictions), outcomes(reference)
    return float(rel_entr(p, np.maximum(q, tiny)).sum(1).mean())


def summarise(
    predictions: pd.DataFrame, prompt: Prompt, response_tokens: tuple[int, ...], references: dict[str, pd.DataFrame]
) -> dict[str, float]:
    """The metrics of one policy on one set of sentences.

    ``response_tokens`` are the lengths of the responses with end token, indexed by label. ``references`` maps
    "parent" and "base" to their predictions on the same sentences. Losses, entropy and KL are in nats. Accuracy,
    balanced accuracy, MCC and the predicted rate judge the likeliest of the responses, whatever else is likely.
    """
    labels = predictions["label"].to_numpy()
    logp = label_log_probabilities(predictions)
    of_label = logp[np.arange(len(labels)), labels]
    likelier = likelier_labels(predictions)
    p = outcomes(predictions)

    def mean_reward(column: str, parse) -> float:
        pairs = zip(labels, predictions[column], strict=True)
        return float(np.mean([reward(label, parse(prompt, answer)) for label, answer in pairs]))

    return {
        "n": len(labels),
        "majority_reward": majority_reward(predictions["label"]),
        "sft_loss": float(-of_label.mean()),
        "sft_loss_per_token": float(-of_label.sum() / np.take(response_tokens, labels).sum()),
        "label_loss": float(-log_softmax(logp, axis=1)[np.arange(len(labels)), labels].mean()),
        "label_mass": float(np.exp(logsumexp(logp, axis=1)).mean()),
        "reward_exact": float((2 * np.exp(of_label) - 1).mean()),
        "reward_sampled": mean_reward("sampled", parse_robust),
        "reward_sampled_strict": mean_reward("sampled", parse_strict),
        "reward_greedy": mean_reward("greedy", parse_robust),
        "accuracy": float((likelier == labels).mean()),
        "balanced_accuracy": float(balanced_accuracy_score(labels, likelier)),
        "mcc": float(matthews_corrcoef(labels, likelier)),
        "predicted_acceptable_rate": float((likelier == logp.shape[1] - 1).mean()),
        "entropy": float(-(p * np.log(np.maximum(p, np.finfo(float).tiny))).sum(1).mean()),
        **{f"kl_to_{name}": mean_outcome_kl(predictions, reference) for name, reference in references.items()},
    }
