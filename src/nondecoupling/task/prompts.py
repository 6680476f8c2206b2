"""The question, its two answers, how answers are read, and what they earn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nondecoupling.study.profile import Prompt

if TYPE_CHECKING:  # reading answers needs no transformers, whose import takes seconds
    from transformers import PreTrainedTokenizerBase

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Chinese

# No demonstration contains a chain of thought, so thinking is off in every prompt of every stage.
TEMPLATE_OPTIONS: dict[str, Any] = {"enable_thinking": False}


def prompt_messages(prompt: Prompt, sentence: str) -> list[dict[str, str]]:
    """The chat that asks about ``sentence``."""
    return [{"role": "user", "content": prompt.template.replace("{sentence}", sentence)}]


def responses(prompt: Prompt) -> tuple[str, str]:
    """The two answers, indexed by label: (unacceptable, acceptable)."""
    return prompt.unacceptable, prompt.acceptable


def other_wordings(prompt: Prompt) -> tuple[str, str]:
    """The two answers in the prompt's other wording, indexed by label."""
    unacceptable, acceptable = (prompt.other_wording.replace("{answer}", answer) for answer in responses(prompt))
    return unacceptable, acceptable


def chat_ids(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of rendered chats, up to where the answer begins."""
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentences: Sequence[str]) -> list[list[int]]:
    """Token ids of the chats that ask about ``sentences``."""
    return chat_ids(tokenizer, [prompt_messages(prompt, sentence) for sentence in sentences])


def response_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response with the end-of-turn token: what is taught, scored and sampled."""
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def answer_texts(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Sampled answers as text, without their end token; any other special token stays visible, and is no label."""
    ended = [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
    return tokenizer.batch_decode(ended, skip_special_tokens=False)


def check_prefix(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentence: str) -> None:
    """Raise ValueError unless the tokens of prompt + response are the prompt's tokens followed by the response's.

    Otherwise the model would be taught other tokens than those it is asked to produce.
    """
    for response in responses(prompt):
        chat = [*prompt_messages(prompt, sentence), {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, **TEMPLATE_OPTIONS)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = [*prompt_ids(tokenizer, prompt, [sentence])[0], *response_ids(tokenizer, response)]
        if whole[: len(parts)] != parts:
            raise ValueError(
                f"The tokenizer merges prompt and answer '{response}' differently from the two apart; "
                f"choose other answer words or another chat template."
            )


def parse_strict(prompt: Prompt, answer: str) -> int | None:
    """Label of an answer that is exactly one of the two responses, else None (the paper's training reward)."""
    return {text: label for label, text in enumerate(responses(prompt))}.get(answer)


def parse_other_wording(prompt: Prompt, answer: str) -> int | None:
    """Label of an answer that is exactly one of the two responses in the other wording, else None."""
    return {text: label for label, text in enumerate(other_wordings(prompt))}.get(answer)


def parse_robust(prompt: Prompt, answer: str) -> int | None:
    """Label whose words are mentioned last in the answer, else None (the paper's evaluation).

    Words are read as words: in any case, whatever punctuation is beside them, also where the prompt's own answer has
    some ("Yes, it is" says "Yes."). A single letter must be as it is written ("a verb" does not say A). In scripts that
    put no spaces between words, words may be anywhere.
    """
    mentions = list(mentions_of(responses(prompt)).finditer(answer))
    return int(str(mentions[-1].lastgroup)[-1]) if mentions else None


@lru_cache
def mentions_of(answers: tuple[str, str]) -> re.Pattern[str]:
    """What finds the words of two answers in a text, each as a group named by its label, the longer one first."""
    patterns = []
    for label, text in enumerate(answers):
        words = re.sub(r"^\W+|\W+$", "", text) or text
        pattern = re.escape(words) if UNSPACED.search(words) else rf"(?<!\w){re.escape(words)}(?!\w)"
        letter = len(words) == 1 and words.isalpha() and not UNSPACED.search(words)
        patterns.append((len(words), f"(?P<label{label}>{pattern if letter else f'(?i:{pattern})'})"))
    return re.compile("|".join(pattern for _, pattern in sorted(patterns, reverse=True)))


def reward(label: int, parsed: int | None) -> float:
    """r(x, y): +1 if the parsed answer is the right label, -1 otherwise (also when nothing could be parsed)."""
    return 1.0 if parsed == label else -1.0
