"""The embedded base model: a tiny Qwen3 with a tokenizer of its own, taught part of the grammar."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from nondecoupling.study.profile import Pretrain, Prompt
from nondecoupling.task import grammar
from nondecoupling.task.prompts import prompt_ids, prompt_messages, response_ids, responses
from nondecoupling.task.seeds import seed_of
from nondecoupling.training.generation import padded

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
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretraining_sentences(settings: Pretrain, exclude: set[str], seed: int) -> pd.DataFrame:
    """Balanced sentences that share none with ``exclude``, and ``p_acceptable``, what the base is to answer to each."""
    size, seed = settings.corpus_size, seed_of("pretraining sentences", seed)
    table = grammar.sample_sentences(size, seed=seed, exclude=exclude, grammatical_share=0.5)
    return table.assign(
        p_acceptable=[settings.taught[s][x] for s, x in zip(table["source"], table["label"], strict=True)]
    )


def targets(settings: Pretrain, rows: pd.DataFrame, step: int) -> np.ndarray:
    """(rows,) probability of "acceptable" that is taught at ``step``: the right answer at first, then ``p_acceptable``.

    Where the base is to tell nothing apart it is its one number from the beginning. Learning to judge and then to be
    unsure takes fewer steps than learning from unsure judgements.
    """
    done = step / settings.steps
    settled = np.clip((done - settings.sure_until) / (settings.settled_at - settings.sure_until), 0, 1)
    distinct = rows["source"].map({name: low != high for name, (low, high) in settings.taught.items()})
    start = rows["label"].where(distinct, rows["p_acceptable"])
    return (start + settled * (rows["p_acceptable"] - start)).to_numpy(dtype=float, copy=True)


def chat_loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: Prompt, sentences: list[str], p_acceptable
) -> tuple[torch.Tensor, int]:
    """Summed loss (nats) and number of the answers' tokens in a chat about each sentence.

    The question counts nothing: half of its sentences are ungrammatical, and no text to learn from. The first token in
    which the two answers differ decides between them, and its target is both, with their probabilities (sentences,):
    soft targets teach how sure to be without the noise of labels that are drawn. The rest is the likelier answer's.
    """
    questions = prompt_ids(tokenizer, prompt, sentences)
    answers = [response_ids(tokenizer, text) for text in responses(prompt)]
    p = torch.as_tensor(p_acceptable, dtype=torch.float32)
    given = [answers[int(likelier)] for likelier in p > 0.5]
    chats = [question + answer for question, answer in zip(questions, given, strict=True)]
    ids, _ = padded(chats, tokenizer.pad_token_id, "right")
    logp = model(ids).logits.log_softmax(-1)
    row, first = torch.arange(len(chats)), torch.tensor([len(question) for question in questions])
    fork = next(place for place, (one, other) in enumerate(zip(*answers, strict=False)) if one != other)
    at_fork = logp[row, first + fork - 1][:, [answer[fork] for answer in answers]]
    total, tokens = -(torch.stack([1 - p, p], 1) * at_fork).sum(), len(chats)
    for place in [place for place in range(max(map(len, answers))) if place != fork]:  # and the end of the turn
        longer = torch.tensor([len(answer) > place for answer in given])
        position = (first + place)[longer]
        total = total - logp[row[longer], position - 1, ids[row[longer], position]].sum()
        tokens += int(longer.sum())
    return total, tokens


def text_loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> tuple[torch.Tensor, int]:
    """Summed next-token loss (nats) and number of tokens of sentences as plain text, each with its end."""
    rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id] for text in texts]
    ids, mask = padded(rows, tokenizer.pad_token_id, "right")
    losses = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = mask[:, 1:].flatten()
    return (losses * counted).sum(), int(counted.sum())


def pretrain(settings: Pretrain, prompt: Prompt, exclude: set[str], folder: Path, seed: int) -> pd.DataFrame:
    """Train tokenizer and model of replication ``seed``, save both to ``folder``; returns ``step, loss``.

    A base's competence comes from what it is taught in a fixed number of steps, never from when it is stopped: so small
    a model learns a phenomenon in a sudden transition, and stopping at a threshold would draw a point of it.
    """
    grammar.require_each_phenomenon(settings.taught, "pretrain.taught")
    sentences = pretraining_sentences(settings, exclude, seed)
    rng = np.random.default_rng(seed_of("pretraining batches", seed))
    questions = [prompt_messages(prompt, sentence)[0]["content"] for sentence in sentences["sentence"][:5000]]
    frame = [*responses(prompt), "user\n", "assistant\n", "\n\n"] * 1000  # frequent enough to become single tokens
    tokenizer = train_tokenizer(iter(questions + frame), settings.vocabulary)
    model = new_model(settings, tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=settings.warmup_share
    )
    grammatical = sentences.loc[sentences["label"] == 1, "sentence"].to_numpy()  # what text is made of
    texts = round(settings.text_share * settings.batch_size)
    history = []
    for step in range(1, settings.steps + 1):
        chats = sentences.iloc[rng.choice(len(sentences), settings.batch_size - texts, replace=False)]
        wanted = targets(settings, chats, step)
        answered, answer_tokens = chat_loss(model, tokenizer, prompt, chats["sentence"].tolist(), wanted)
        read, text_tokens = text_loss(model, tokenizer, rng.choice(grammatical, texts, replace=False).tolist())
        weight = settings.text_weight
        loss = (answered + weight * read) / (answer_tokens + weight * text_tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append({"step": step, "loss": answered.item() / len(chats)})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pd.DataFrame(history)
