"""How a model reads and answers: prompts that are read once, answers that are scored or sampled from there."""

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache


def padded(
    rows: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"], device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` of token ids as (ids, mask), both (rows, longest), filled up with ``pad`` and 0 on one side."""
    ids = [torch.tensor(list(row)) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
    return pad_sequence(ids, True, pad, side).to(device), mask.to(device)


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all ``rows`` begin, at least one of each row left out."""
    shortest = min(map(len, rows)) - 1
    differs = (place for place in range(shortest) if any(row[place] != rows[0][place] for row in rows))
    return list(rows[0][: next(differs, shortest)])


def only(position: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What tells a causal LM to compute the logits of one position only.

    An index and not a number: the slice that a number gives would be copied once per row on its way to the head.
    """
    return {"logits_to_keep": torch.tensor([position], device=device)}


def read_start(
    model: torch.nn.Module, rows: Sequence[Sequence[int]], pad: int, answers: bool = True
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """A cache in which the model has read what all ``rows`` begin with, and what is left of them to read.

    Returns (cache, ids, mask): ids (rows, longest rest), filled up on the left; mask covers the common start, too. It
    is read once whatever the number of rows, and gradients reach it from all of them.
    """
    device, cache, start = next(model.parameters()).device, DynamicCache(), common_start(rows)
    # A sliding window is counted in columns: where it may be less than a row, none may fill up what is between tokens.
    window = getattr(model.config.get_text_config(), "sliding_window", None)  # type: ignore[union-attr, operator]
    if window and window < 2 * max(map(len, rows)):
        start = []
    ids, mask = padded([row[len(start) :] for row in rows], pad, "left", device)
    if start:
        last = only(len(start) - 1, device) if answers else {}
        model(torch.tensor([start], device=device), past_key_values=cache, use_cache=True, **last)
        cache.batch_repeat_interleave(len(rows))
    return cache, ids, torch.cat([mask.new_ones(len(rows), len(start)), mask], 1)


class Prefix:
    """Questions that a model has read once; every answer to them is then scored or sampled from the cached state.

    What all questions begin with is read once for all of them, and so are questions that are equal. Gradients are those
    of reading each for itself. A causal LM (``answers``) keeps the logits of the first token of an answer; a reward
    model has none. Raises FloatingPointError where the model gives no probabilities.
    """

    def __init__(self, model: torch.nn.Module, rows: Sequence[Sequence[int]], pad: int, answers: bool = True) -> None:
        place = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        self.cache, ids, self.mask = read_start(model, list(place), pad, answers)
        self.model, self.pad, self.length = model, pad, self.mask.shape[1]
        self.of = torch.tensor([place[tuple(row)] for row in rows], device=ids.device)  # (rows,) the question of each
        positions = (self.mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        cached = {"past_key_values": self.cache, "use_cache": True}
        last = only(ids.shape[1] - 1, ids.device) if answers else {}
        output = model(ids, attention_mask=self.mask, position_ids=positions, **cached, **last)
        self.first = output.logits[:, -1].float()  # (questions, vocabulary): the answer's first token
        if not self.first.isfinite().all():
            raise FloatingPointError("a probability is not finite")

    def branch(self, of: torch.Tensor) -> DynamicCache:
        """A copy of the cached state with a row for each of the questions ``of``; the original stays as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        if not torch.equal(of, torch.arange(len(self.mask), device=of.device)):
            cache.batch_select_indices(of)
        return cache

    def read(self, cache: DynamicCache, of: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Append ``tokens`` (rows, k) to ``cache``, whose rows answer the questions ``of``.

        Returns the logits after each, (rows, k, vocabulary), or a reward model's score of each row, (rows, 1).
        """
        done = cache.get_seq_length() - self.length
        mask = torch.cat([self.mask[of], self.mask.new_ones(len(tokens), done + tokens.shape[1])], 1)
        positions = mask.sum(1, keepdim=True) - tokens.shape[1] + torch.arange(tokens.shape[1], device=tokens.device)
        cached = {"past_key_values": cache, "use_cache": True}
        return self.model(tokens, attention_mask=mask, position_ids=positions, **cached).logits.float()

    def logits(self, answers: torch.Tensor) -> torch.Tensor:
        """The logits before each token of ``answers`` (rows, k), one answer per row: (rows, k, vocabulary)."""
        first = self.first[self.of, None]
        if answers.shape[1] == 1:
            return first
        return torch.cat([first, self.read(self.branch(self.of), self.of, answers[:, :-1])], 1)

    def scores(self, answers: torch.Tensor) -> torch.Tensor:
        """(rows,) what a reward model gives ``answers`` (rows, k)."""
        return self.read(self.branch(self.of), self.of, answers)[:, 0]

    def log_probability(self, response: Sequence[int]) -> torch.Tensor:
        """log p(response | question), nats over the full vocabulary, (rows,)."""
        tokens = torch.tensor([list(response)] * len(self.of), device=self.of.device)
        return self.logits(tokens).log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))

    def answers(
        self, eos: int, limit: int, greedy: bool = False, generator: torch.Generator | None = None
    ) -> list[list[int]]:
        """One answer per row as token ids, with the end token if it came within ``limit``; sampled at temperature 1.

        What several answers to a question have in common is read once: draws from the same probabilities.
        """
        logits, told, of, cache, columns = self.first, self.of, torch.arange(len(self.first)), None, []
        of = of.to(told.device)
        ended = torch.zeros(len(told), dtype=torch.bool, device=told.device)
        for step in range(limit):
            draw = logits.argmax(-1)[told] if greedy else drawn(logits, told, generator)
            columns.append(draw.masked_fill(ended, self.pad))
            ended |= columns[-1] == eos
            if ended.all() or step == limit - 1:
                break
            going = ~ended
            kinds, kind = torch.unique(torch.stack([told[going], columns[-1][going]], 1), dim=0, return_inverse=True)
            before = kinds[:, 0]
            of = of[before]
            if cache is None:
                cache = self.branch(of)
            else:
                cache.batch_select_indices(before)
            logits = self.read(cache, of, kinds[:, 1:])[:, -1]
            told = torch.zeros_like(told).masked_scatter(going, kind)
        return [row[: row.index(eos) + 1] if eos in row else row for row in torch.stack(columns, 1).tolist()]


def drawn(logits: torch.Tensor, of: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """(rows,) one token each, drawn from the probabilities that the rows ``of`` of ``logits`` give.

    By inverting the distribution function, which for a real vocabulary takes a tenth of `torch.multinomial`'s time. Two
    policies that are alike then mostly give the same answers to the same draws.
    """
    below = logits.double().softmax(-1).cumsum(-1)[of]
    u = torch.rand((len(of), 1), dtype=below.dtype, device=below.device, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, u, right=True)[:, 0].clamp(max=below.shape[1] - 1)


def answer_logits(
    model: torch.nn.Module, questions: Sequence[Sequence[int]], answers: torch.Tensor, pad: int
) -> torch.Tensor:
    """The logits before each token of one answer to each question, (rows, k, vocabulary), with gradient, in float32.

    ``answers`` (rows, k) are filled up on the right. Equal questions are read once for all their answers. Where none
    are, question and answer are read in one pass: a pass costs a small model more than the tokens in it.
    """
    if len(set(map(tuple, questions))) < len(questions):
        return Prefix(model, questions, pad).logits(answers)
    cache, ids, mask = read_start(model, questions, pad)
    answered = torch.cat([ids, answers[:, :-1]], 1)
    mask = torch.cat([mask, mask.new_ones(len(answers), answers.shape[1] - 1)], 1)
    positions = (mask.cumsum(1) - 1)[:, -answered.shape[1] :]
    kept = torch.arange(ids.shape[1] - 1, answered.shape[1], device=ids.device)
    return model(
        answered,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=kept,
    ).logits.float()


def answer_log_probabilities(
    model: torch.nn.Module, questions: Sequence[Sequence[int]], answers: torch.Tensor, pad: int
) -> torch.Tensor:
    """log p of each token of the answers that `answer_logits` describes, (rows, k), nats, with gradient."""
    return answer_logits(model, questions, answers, pad).log_softmax(-1).gather(-1, answers[..., None])[..., 0]


def batches(rows: Sequence, size: int) -> Iterator[Sequence]:
    """``rows`` in consecutive pieces of at most ``size``."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
