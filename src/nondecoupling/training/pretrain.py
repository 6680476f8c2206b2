"""The embedded base model: a tiny Qwen3 with a tokenizer of its own, taught part of the grammar."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from nondecoupling.study.profile import Data, Pretrain, Prompt
from nondecoupling.task import grammar
from nondecoupling.task.annotators import phenomena, truths
from nondecoupling.task.prompts import prompt_ids, prompt_messages, response_ids, responses
from nondecoupling.task.seeds import seed_of
from nondecoupling.training.generation import padded

LogitsAt = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (n,) rows, (n,) places: (n, vocabulary)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen's own pre-tokenizer pattern: with it "\n\n" never merges with the word after it, so the prompt's tokens are a
# prefix of prompt + answer (GPT-2's pattern breaks that).
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif -%}
{%- endif -%}"""


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens and a chat template that honours ``enable_thinking``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    thoughts = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(thoughts),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(thoughts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
    )


def new_model(settings: Pretrain, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """An untrained model of Qwen3's architecture, tied embeddings, shape from ``settings``."""
    set_seed(seed_of("pretraining weights", seed))
    heads = settings.hidden_size // settings.head_size
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=settings.head_size,
            max_position_embeddings=512,
            # Each token starts with a vector of length 1, whatever the size: transformers' 0.02 is for models that are
            # ten times as wide.
            initializer_range=settings.hidden_size**-0.5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretraining_sentences(
    settings: Pretrain, exclude: set[str], seed: int, drawn: Collection[str] = tuple(grammar.PHENOMENA)
) -> pd.DataFrame:
    """Balanced sentences of the phenomena ``drawn``, none of ``exclude``: ``source, label`` (1 acceptable), ``mark``.

    Phenomena of which the base is taught nothing come less often than the others, by ``settings.untaught_share``.
    """
    size, seed = settings.corpus_size, seed_of("pretraining sentences", seed)
    table = grammar.sample_sentences(size, seed=seed, exclude=exclude, grammatical_share=0.5, phenomena=drawn)
    kept = np.random.default_rng(seed).random(size)
    return table[told_apart(settings, table) | (kept < settings.untaught_share)].reset_index(drop=True)


def reading(model: Qwen3ForCausalLM, ids: torch.Tensor) -> LogitsAt:
    """What ``model`` expects after any places of ``ids`` (rows, longest), filled up on the right, in one pass.

    Only the places that are asked for go through the head.
    """
    states = model.model(ids).last_hidden_state
    return lambda row, place: model.lm_head(states[row, place])


def told_apart(settings: Pretrain, table: pd.DataFrame) -> pd.Series:
    """(rows,) is the sentence of a phenomenon in which the base is to tell unacceptable from acceptable?"""
    return table["source"].map({name: low != high for name, (low, high) in settings.taught.items()})


def taught_acceptable(settings: Pretrain) -> dict[str, list[float]]:
    """The probability of "acceptable", the last answer, that is taught of unacceptable and of acceptable sentences."""
    return {
        name: [shares[-1] if isinstance(shares, list) else shares for shares in pair]
        for name, pair in settings.taught.items()
    }


def in_turn(count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) numbers below ``count`` in random order, each as often as any other and none twice before all came."""
    return np.concatenate([rng.permutation(count) for _ in range(-(-draws // count))])[:draws]


def targets(settings: Pretrain, sentences: pd.DataFrame, truth: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """(rows, K - 1) probabilities of all answers but the first that are taught at first, and those in the end.

    First the right answer, the label ``truth``, then what is ``taught``: learning to judge and then to be unsure takes
    fewer steps than learning from unsure judgements. Where the base is to tell nothing apart it is that from the
    beginning. The first answer has what the others leave.
    """
    taught = (settings.taught[s][x] for s, x in zip(sentences["source"], sentences["label"], strict=True))
    last = np.array([shares[1:] if isinstance(shares, list) else [shares] for shares in taught], dtype=float)
    right = truth.to_numpy()[:, None] == np.arange(1, last.shape[1] + 1)
    return np.where(told_apart(settings, sentences).to_numpy()[:, None], right, last), last


def settled(settings: Pretrain, step: int) -> float:
    """How far targets have come at ``step``, from 0, the first, to 1, the last."""
    way = (step / settings.steps - settings.sure_until) / (settings.settled_at - settings.sure_until)
    return min(max(way, 0.0), 1.0)


def fork_of(answers: list[list[int]]) -> int:
    """The first place in which ``answers`` differ: all of them, so that one token decides; ValueError if two do not."""
    fork = next(place for place, tokens in enumerate(zip(*answers, strict=False)) if len(set(tokens)) > 1)
    if len({answer[fork] for answer in answers}) < len(answers):
        raise ValueError(
            "The first token in which the prompt's answers differ must tell all of them apart; choose other words."
        )
    return fork


def chat_loss(
    logits_at: LogitsAt, lengths: list[int], answers: list[list[int]], p: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Summed loss (nats) and number of the answers' tokens in chats, rows that `chat_rows` made.

    ``lengths`` are the questions'. A question counts nothing: half of its sentences are ungrammatical, and no text to
    learn from. The first token in which the ``answers`` differ decides between them, and its target is all of them,
    with their probabilities ``p`` (chats, K): soft targets teach how sure to be without the noise of labels that are
    drawn. The rest is the likeliest answer's.
    """
    given, row, first, fork = p.argmax(1), torch.arange(len(lengths)), torch.tensor(lengths), fork_of(answers)
    at_fork = logits_at(row, first + fork - 1).log_softmax(-1)[:, [answer[fork] for answer in answers]]
    total, tokens = -(p * at_fork).sum(), len(lengths)
    for place in [place for place in range(max(map(len, answers))) if place != fork]:  # and the end of the turn
        token = torch.tensor([answer[place] if place < len(answer) else -1 for answer in answers])[given]
        longer = token >= 0
        logits = logits_at(row[longer], first[longer] + place - 1)
        total = total + cross_entropy(logits, token[longer], reduction="sum")
        tokens += len(logits)
    return total, tokens


def chat_rows(questions: list[list[int]], answers: list[list[int]], p: torch.Tensor) -> list[list[int]]:
    """Token ids of each question with the likeliest of the answers, which have probabilities ``p`` (questions, K)."""
    given = p.argmax(1).tolist()
    return [[*question, *answers[label]] for question, label in zip(questions, given, strict=True)]


def text_loss(logits_at: LogitsAt, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed next-token loss (nats) and number of tokens of texts, whose ids and mask are (texts, longest)."""
    row, place = mask[:, 1:].nonzero(as_tuple=True)
    return cross_entropy(logits_at(row, place), ids[row, place + 1], reduction="sum"), len(row)


def pretrain(
    settings: Pretrain, data: Data, prompt: Prompt, exclude: set[str], folder: Path, seed: int
) -> pd.DataFrame:
    """Train tokenizer and model of replication ``seed``, save both to ``folder``; returns ``step, loss``.

    A base's competence comes from what it is taught in a fixed number of steps, never from when it is stopped: so small
    a model learns a phenomenon in a sudden transition, and stopping at a threshold would draw a point of it.
    """
    drawn = phenomena(data)
    grammar.require_each_phenomenon(settings.taught, "pretrain.taught", drawn)
    sentences = pretraining_sentences(settings, exclude, seed, drawn)
    rng = np.random.default_rng(seed_of("pretraining batches", seed))
    spelt = [prompt_messages(prompt, sentence)[0]["content"] for sentence in sentences["sentence"][:5000]]
    frame = [*responses(prompt), "user\n", "assistant\n", "\n\n"] * 1000  # frequent enough to become single tokens
    tokenizer = train_tokenizer(iter(spelt + frame), settings.vocabulary)
    model = new_model(settings, tokenizer, seed)
    # A shorter memory of squared gradients and more decay than the defaults: chosen on seeds that are not reported.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=settings.warmup_share
    )
    questions = prompt_ids(tokenizer, prompt, sentences["sentence"])
    answers, pad = [response_ids(tokenizer, text) for text in responses(prompt)], tokenizer.pad_token_id
    grammatical = sentences.loc[sentences["label"] == 1, "sentence"].tolist()  # what text is made of
    texts = [[*text, pad] for text in tokenizer(grammatical, add_special_tokens=False)["input_ids"]]
    texts_read = round(settings.text_share * settings.batch_size)
    sure, unsure = targets(settings, sentences, truths(data, sentences))
    chats_read, history = settings.batch_size - texts_read, []
    order = in_turn(len(sentences), settings.steps * chats_read, rng).reshape(settings.steps, chats_read)
    for step, chosen in enumerate(order, 1):
        way = settled(settings, step)
        others = torch.tensor((1 - way) * sure[chosen] + way * unsure[chosen], dtype=torch.float32)
        p = torch.cat([1 - others.sum(1, keepdim=True), others], 1)
        asked = [questions[row] for row in chosen]
        chats = chat_rows(asked, answers, p)
        ids, mask = padded(chats + [texts[row] for row in rng.choice(len(texts), texts_read)], pad, "right")
        logits_at = reading(model, ids)
        answered, answer_tokens = chat_loss(logits_at, [len(row) for row in asked], answers, p)
        mask[:chats_read] = 0  # of the texts alone
        read, text_tokens = text_loss(logits_at, ids, mask)
        weight = settings.text_weight
        loss = (answered + weight * read) / (answer_tokens + weight * text_tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append({"step": step, "loss": answered.item() / chats_read})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pd.DataFrame(history)
