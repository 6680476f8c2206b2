"""How a model reads and answers: prompts that are read once, answers that are scored or sampled from there."""

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


class Prefix:
    """Prompts that a model has read once; every answer to them is then scored or sampled from the cached state.

    What all prompts begin with is read once for all of them. Raises FloatingPointError where the model gives no
    probabilities.
    """

    def __init__(self, model: torch.nn.Module, rows: Sequence[Sequence[int]], pad: int, copies: int = 1) -> None:
        device = next(model.parameters()).device
        start = common_start(rows)
        ids, mask = padded([row[len(start) :] for row in rows], pad, "left", device)
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
