"""What a policy does on given sentences: exact label probabilities, sampled and greedy answers, and their metrics."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax, logsumexp, rel_entr
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from nondecoupling.corpus import majority_reward
from nondecoupling.profile import Evaluation, Prompt
from nondecoupling.prompts import answer_texts, parse_robust, parse_strict, prompt_ids, response_ids, responses, reward


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` of token ids as (ids, mask), both (rows, longest), padded on the left so that all end together."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all ``rows`` begin, at least one of each row left out."""
    shortest = min(map(len, rows)) - 1
    differs = (place for place in range(shortest) if any(row[place] != rows[0][place] for row in rows))
    return list(rows[0][: next(differs, shortest)])


class Prefix:
    """Prompts that a model has read once; every answer to them is then scored or sampled from the cached state.

    What all prompts begin with is read once for all of them. Raises FloatingPointError where the model gives no
    probabilities.
    """

    def __init__(self, model: torch.nn.Module, rows: Sequence[Sequence[int]], pad: int, copies: int = 1) -> None:
        device = next(model.parameters()).device
        start = common_start(rows)
        ids, mask = left_padded([row[len(start) :] for row in rows], pad, device)
        self.mask = torch.cat([mask.new_ones(len(rows), len(start)), mask], 1)
        self.model, self.pad, self.length = model, pad, self.mask.shape[1]
        self.cache = DynamicCache()
        if start:
            model(torch.tensor([start], device=device), past_key_values=self.cache, logits_to_keep=1)
            self.cache.batch_repeat_interleave(len(rows))
        positions = (self.mask.cumsum(1) - 1)[:, len(start) :]
        output = model(
            ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, logits_to_keep=1
        )
        self.first = output.logits[:, -1].float()  # (prompts, vocabulary): the answer's first token
        if not self.first.isfinite().all():
            raise FloatingPointError("a probability is not finite")
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
            self.mask = self.mask.repeat_interleave(copies, 0)
            self.first = self.first.repeat_interleave(copies, 0)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append ``tokens`` (rows, k) and return the logits after each, (rows, k, vocabulary)."""
        done = self.cache.get_seq_length() - self.length
        mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), done + tokens.shape[1])], 1)
        positions = mask.sum(1, keepdim=True) - tokens.shape[1] + torch.arange(tokens.shape[1], device=tokens.device)
        return self.model(
            tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache
        ).logits.float()

    def rewind(self) -> None:
        """Forget all that was read after the prompts."""
        self.cache.crop(self.length - self.cache.get_seq_length())  # a negative number removes that many

    def log_probability(self, response: Sequence[int]) -> torch.Tensor:
        """log p(response | prompt), nats over the full vocabulary, (prompts,)."""
        tokens = torch.tensor([list(response)] * len(self.mask), device=self.mask.device)
        logits = torch.cat([self.first[:, None], self.read(tokens[:, :-1])], 1)
        self.rewind()
        return logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))

    def answers(
        self, eos: int, limit: int, greedy: bool = False, generator: torch.Generator | None = None
    ) -> list[list[int]]:
        """One answer per row as token ids, with the end token if it came within ``limit``; sampled at temperature 1."""
        logits, columns = self.first, []
        ended = torch.zeros(len(self.mask), dtype=torch.bool, device=self.mask.device)
        for step in range(limit):
            draw = logits.argmax(-1, True) if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator)
            token = draw[:, 0]
            columns.append(token.masked_fill(ended, self.pad))
            ended |= token == eos
            if ended.all() or step == limit - 1:
                break
            logits = self.read(columns[-1][:, None])[:, -1]
        self.rewind()
        return [row[: row.index(eos) + 1] if eos in row else row for row in torch.stack(columns, 1).tolist()]


def batches(rows: Sequence, size: int) -> Iterator[Sequence]:
    """``rows`` in consecutive pieces of at most ``size``."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    table: pd.DataFrame,
    evaluation: Evaluation,
) -> pd.DataFrame:
    """The policy's answers to every sentence of ``table``, one row each.

    Columns ``sentence, label, source, logp_acceptable, logp_unacceptable, sampled, greedy``: log p of the whole
    response with its end token (nats), and one answer sampled at temperature 1 and one greedy as text. Sampling has a
    generator of its own, seeded by ``evaluation.seed``: measuring never disturbs training, and all policies share the
    draws.
    """
    was_training = model.training
    model.eval()
    rows = prompt_ids(tokenizer, prompt, table["sentence"])
    unacceptable, acceptable = (response_ids(tokenizer, text) for text in responses(prompt))
    generator = torch.Generator(next(model.parameters()).device).manual_seed(evaluation.seed)
    logp_acceptable, logp_unacceptable, sampled, greedy = [], [], [], []
    for batch in batches(rows, evaluation.batch_size):
        prefix = Prefix(model, batch, tokenizer.pad_token_id)
        logp_acceptable += prefix.log_probability(acceptable).tolist()
        logp_unacceptable += prefix.log_probability(unacceptable).tolist()
        sampled += prefix.answers(tokenizer.eos_token_id, prompt.max_new_tokens, generator=generator)
        greedy += prefix.answers(tokenizer.eos_token_id, prompt.max_new_tokens, greedy=True)
    model.train(was_training)
    return (
        table[["sentence", "label", "source"]]
        .assign(
            logp_acceptable=logp_acceptable,
            logp_unacceptable=logp_unacceptable,
            sampled=answer_texts(tokenizer, sampled),
            greedy=answer_texts(tokenizer, greedy),
        )
        .reset_index(drop=True)
    )


def label_log_probabilities(predictions: pd.DataFrame) -> np.ndarray:
    """(sentences, 2) log p of the two responses, indexed by label: column 1 is "acceptable"."""
    return predictions[["logp_unacceptable", "logp_acceptable"]].to_numpy(dtype=float)


def three_outcomes(predictions: pd.DataFrame) -> np.ndarray:
    """(sentences, 3) probabilities of "unacceptable", "acceptable" and anything else."""
    labels = np.exp(label_log_probabilities(predictions))
    return np.column_stack([labels, np.clip(1 - labels.sum(1), 0, None)])


def mean_outcome_kl(predictions: pd.DataFrame, reference: pd.DataFrame) -> float:
    """E_x KL(policy || reference) in nats over the outcomes of `three_outcomes`.

    The KL over whole answers is at least this, and equal to it where the two policies word "anything else" alike.
    """
    tiny = np.finfo(float).tiny
    p, q = three_outcomes(predictions), three_outcomes(reference)
    return float(rel_entr(p, np.maximum(q, tiny)).sum(1).mean())


def summarise(
    predictions: pd.DataFrame, prompt: Prompt, response_tokens: tuple[int, int], references: dict[str, pd.DataFrame]
) -> dict[str, float]:
    """The metrics of one policy on one set of sentences.

    ``response_tokens`` are the lengths of the two responses with end token, indexed by label. ``references`` maps
    "parent" and "base" to their predictions on the same sentences. Losses, entropy and KL are in nats. Accuracy,
    balanced accuracy, MCC and the predicted rate judge the likelier of the two responses, whatever else is likely.
    """
    labels = predictions["label"].to_numpy()
    logp = label_log_probabilities(predictions)
    of_label = logp[np.arange(len(labels)), labels]
    likelier = (logp[:, 1] > logp[:, 0]).astype(int)
    p = three_outcomes(predictions)

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
        "predicted_acceptable_rate": float(likelier.mean()),
        "entropy": float(-(p * np.log(np.maximum(p, np.finfo(float).tiny))).sum(1).mean()),
        **{f"kl_to_{name}": mean_outcome_kl(predictions, reference) for name, reference in references.items()},
    }
