"""Tiny random models of the kinds that people have, each with a tokenizer and a chat template of its kind's habits."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from nondecoupling.task import grammar

# A beginning of every text, a role that is refused, other names of roles.
GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' \
+ message.content | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# An end of text after the last end of turn.
PHI = """\
{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}\
{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""
# Spaces around an answer.
LLAMA2 = """\
{% for message in messages %}{% if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}\
{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
# The date, to the microsecond.
LLAMA3 = """\
{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %f') + '<|eot_id|>' }}\
{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' \
+ message.content | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# An end of turn that is no end of text.
QWEN = """\
{% for message in messages %}{% if loop.first %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Thoughts that are opened whatever one asks for.
THINKING = QWEN.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
# No special tokens but the end of text.
PLAIN = """\
{% for message in messages %}{{ message.role + ':\\n\\n' + message.content + eos_token + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:\\n\\n' }}{% endif %}"""
# No end at all.
ENDLESS = PLAIN.replace(" + eos_token", "")


class Kind(NamedTuple):
    """A type of model and its small shape; its tokenizer's pieces, special tokens and their names; its template.

    ``ends`` is the token that ends an answer.
    """

    type: str
    shape: dict[str, Any]
    pieces: str
    special: list[str]
    named: dict[str, str]
    template: str
    ends: str


DENSE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = DENSE | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = GROUPED | {"sliding_window": 8}  # less than a question
TEXT, TURN = "<|endoftext|>", "<|im_end|>"
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
OF_GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
OF_PHI, OF_QWEN, END = [TEXT, "<|user|>", "<|assistant|>", "<|end|>"], [TEXT, "<|im_start|>", TURN], {"eos_token": TEXT}
PADDED = END | {"pad_token": TEXT}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
KINDS = {
    "Gemma 2": Kind("gemma2", SLIDING, "spaced", OF_GEMMA, NAMED, GEMMA, "<end_of_turn>"),
    "Gemma 3": Kind(
        "gemma3_text", GROUPED | {"sliding_window": 512}, "spaced", OF_GEMMA, NAMED, GEMMA, "<end_of_turn>"
    ),
    "Phi 2": Kind("phi", DENSE | {"embd_pdrop": 0.1, "resid_pdrop": 0.1}, "bytes", [TEXT], END, ENDLESS, TEXT),
    "Phi 3": Kind("phi3", DENSE | {"resid_pdrop": 0.1}, "prefixed", OF_PHI, PADDED, PHI, "<|end|>"),
    "Llama 2": Kind(
        "llama", GROUPED, "prefixed", ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}, LLAMA2, "</s>"
    ),
    "Llama 3": Kind(
        "llama", GROUPED, "bytes", HEADERS, {"bos_token": HEADERS[0], "eos_token": HEADERS[1]}, LLAMA3, "<|eot_id|>"
    ),
    "Mistral": Kind("mistral", SLIDING, "bytes", OF_QWEN, PADDED, QWEN, TURN),
    "GPT-2": Kind("gpt2", GPT2, "bytes", [TEXT], END, PLAIN, TEXT),
    "BLOOM": Kind("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "bytes", [TEXT], END, PLAIN, TEXT),
    # With more embeddings than tokens, as it is published.
    "Qwen 2 base": Kind("qwen2", GROUPED | {"vocab_size": 1024}, "bytes", OF_QWEN, PADDED, QWEN, TURN),
    "a thinking Qwen 3": Kind("qwen3", GROUPED, "bytes", OF_QWEN, PADDED, THINKING, TURN),
}
MAMBA = Kind(
    "mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "bytes", OF_QWEN, PADDED, QWEN, TURN
)


def tokenizer_of(kind: Kind, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, or of SentencePiece's words, before which some put a space (``prefixed``)."""
    if kind.pieces == "bytes":
        tokenizer, kept = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer, kept = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True)), []
        first = [normalizers.Prepend("▁")] if kind.pieces == "prefixed" else []
        tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        spaces = [decoders.Strip(" ", 1, 0)] if first else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *spaces]
        )
    unseen = [] if kept else [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=kind.special + unseen, initial_alphabet=kept, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    written = json.loads(tokenizer.to_str())  # the bytes are in the vocabulary now, and no special tokens
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] in kind.special]
    tokenizer = Tokenizer.from_str(json.dumps(written))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=kind.template, **kind.named)


def make_model(kind: Kind, folder: Path) -> Path:
    """Write a random model of ``kind`` with its tokenizer to ``folder``."""
    sentences = grammar.sample_sentences(200, seed=5)["sentence"]
    tokenizer = tokenizer_of(kind, [*sentences, *["acceptable", "unacceptable", " acceptable", "assistant\n\n"] * 50])
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    set_seed(0)
    wide = {"initializer_range": 0.2}  # else so narrow a model could not favour any token
    shape = {"vocab_size": len(tokenizer)} | kind.shape
    config = AutoConfig.for_model(kind.type, **tokens, **shape, **wide)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
