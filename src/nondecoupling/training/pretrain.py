"""The embedded base model: a tiny Qwen3 with a tokenizer of its own, pretrained until a held-out probe says enough."""

import random
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from sklearn.metrics import balanced_accuracy_score
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from nondecoupling.study.profile import Evaluation, Pretrain, Prompt
from nondecoupling.task import grammar
from nondecoupling.task.prompts import prompt_ids, prompt_messages, response_ids, responses
from nondecoupling.training.evaluation import likelier_labels, predict
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


def new_model(settings: Pretrain, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model of Qwen3's architecture, tied embeddings, shape from ``settings``."""
    set_seed(settings.seed)
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


def pretraining_sentences(settings: Pretrain, exclude: set[str]) -> pd.DataFrame:
    """Clean, balanced sentences that share none with ``exclude``; the last ``probe_size`` are the probe.

    Labels are clean because label noise keeps so small a model from learning at all, and balanced so that the base has
    no preference for an answer.
    """
    return grammar.sample_sentences(
        settings.corpus_size + settings.probe_size, seed=settings.seed, exclude=exclude, grammatical_share=0.5
    )


def encode_chats(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, rows: list[tuple[str, int]]
) -> list[tuple[list[int], list[float]]]:
    """Token ids and loss weights of chats about (sentence, label) rows.

    The question counts 0 (half of its sentences are ungrammatical, and no text to learn from), the answer 1.
    """
    questions = prompt_ids(tokenizer, prompt, [sentence for sentence, _ in rows])
    answers = [response_ids(tokenizer, text) for text in responses(prompt)]
    return [
        (question + answers[label], [0.0] * len(question) + [1.0] * len(answers[label]))
        for question, (_, label) in zip(questions, rows, strict=True)
    ]


def encode_text(tokenizer: PreTrainedTokenizerFast, sentence: str, weight: float) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of a sentence as plain text."""
    ids = [*tokenizer(sentence, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id]
    return ids, [weight] * len(ids)


def weighted_loss(model: Qwen3ForCausalLM, rows: list[tuple[list[int], list[float]]], pad: int) -> torch.Tensor:
    """Mean next-token cross-entropy (nats) of ``rows``, each token counted with its weight."""
    ids, _ = padded([ids for ids, _ in rows], pad, "right")
    weights = pad_sequence([torch.tensor(weight) for _, weight in rows], batch_first=True)[:, 1:]
    losses = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def pretrain(
    settings: Pretrain, prompt: Prompt, evaluation: Evaluation, exclude: set[str], folder: Path
) -> pd.DataFrame:
    """Train tokenizer and model from scratch, save both to ``folder``, and return the probe's history.

    Stops at the first probe whose balanced accuracy reaches ``probe_target``: learning comes in a sudden transition
    whose moment depends on the seed, so a fixed number of steps would give a base that knows nothing or everything.
    Raises RuntimeError if ``max_steps`` pass without that.
    """
    sentences = pretraining_sentences(settings, exclude)
    rng = random.Random(settings.seed)
    reading, probe = sentences.iloc[: settings.corpus_size], sentences.iloc[settings.corpus_size :]
    questions = [prompt_messages(prompt, sentence)[0]["content"] for sentence in reading["sentence"][:5000]]
    frame = [*responses(prompt), "user\n", "assistant\n", "\n\n"] * 1000  # frequent enough to become single tokens
    tokenizer = train_tokenizer(iter(questions + frame), settings.vocabulary)
    model = new_model(settings, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=100)
    rows = list(zip(reading["sentence"], reading["label"], strict=True))
    grammatical = reading.loc[reading["label"] == 1, "sentence"].tolist()  # what text is made of
    texts = round(settings.text_share * settings.batch_size)
    history = []
    for step in range(1, settings.max_steps + 1):
        chats = encode_chats(tokenizer, prompt, rng.sample(rows, settings.batch_size - texts))
        plain = [encode_text(tokenizer, s, settings.text_weight) for s in rng.sample(grammatical, texts)]
        loss = weighted_loss(model, chats + plain, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step % settings.probe_every == 0:
            predictions = predict(model, tokenizer, prompt, probe, evaluation)
            accuracy = balanced_accuracy_score(predictions["label"], likelier_labels(predictions))
            history.append({"step": step, "loss": loss.item(), "probe": float(accuracy)})
            if history[-1]["probe"] >= settings.probe_target:
                break
    else:
        reached = max((row["probe"] for row in history), default=0.0)
        raise RuntimeError(
            f"Pretraining reached balanced accuracy {reached:.2f} on its probe in {settings.max_steps} steps, below "
            f"pretrain.probe_target={settings.probe_target}; raise pretrain.max_steps or change pretrain.seed."
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pd.DataFrame(history)
