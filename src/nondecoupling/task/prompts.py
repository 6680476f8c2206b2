"""The question, its answers, how answers are read, and what they earn."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nondecoupling.study.profile import Prompt

if TYPE_CHECKING:  # reading answers needs no transformers, whose import takes seconds
    from transformers import PreTrainedTokenizerBase

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Chinese

# No demonstration contains a chain of thought, so thinking is off in every prompt of every stage.
TEMPLATE_OPTIONS: dict[str, Any] = {"enable_thinking": False}
# A chat by which a template shows how it writes questions and answers, and the date that templates write.
QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
DAY = "01 Jan 2026"


def prompt_messages(prompt: Prompt, sentence: str) -> list[dict[str, str]]:
    """The chat that asks about ``sentence``."""
    return asking(prompt.template.replace("{sentence}", sentence))


def asking(question: str) -> list[dict[str, str]]:
    """The chat that asks ``question``."""
    return [{"role": "user", "content": question}]


def responses(prompt: Prompt) -> tuple[str, ...]:
    """The answers, indexed by label: (unacceptable, acceptable), or a kind of violation each and then acceptable."""
    return prompt.answers


def other_wordings(prompt: Prompt) -> tuple[str, ...]:
    """The answers in the prompt's other wording, indexed by label."""
    return tuple(prompt.other_wording.replace("{answer}", answer) for answer in responses(prompt))


def rendered(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], asking: bool = True) -> list[str]:
    """Chats as the template writes them; if ``asking``, up to where the answer begins."""
    texts: Any = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=asking, **TEMPLATE_OPTIONS)
    return texts


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts in which special tokens are written already."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def chat_ids(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of rendered chats, up to where the answer begins."""
    return ids_of(tokenizer, rendered(tokenizer, chats))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentences: Sequence[str]) -> list[list[int]]:
    """Token ids of the chats that ask about ``sentences``; those of the last few calls are remembered."""
    return _known_ids(tokenizer, tuple(prompt_messages(prompt, sentence)[0]["content"] for sentence in sentences))


@lru_cache(maxsize=4)  # a stage measures its policy on the same sentences again and again
def _known_ids(tokenizer: PreTrainedTokenizerBase, questions: tuple[str, ...]) -> list[list[int]]:
    return chat_ids(tokenizer, list(map(asking, questions)))


def around_answers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before an answer, after the text that asks, and between it and its end token."""
    [asked], [whole] = rendered(tokenizer, [[QUESTION]]), rendered(tokenizer, [[QUESTION, ANSWER]], asking=False)
    before, _, rest = whole.removeprefix(asked).partition(ANSWER["content"])
    after, end, _ = rest.partition(tokenizer.eos_token)
    return before, after if end else ""


def response_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response with the end-of-turn token: what is taught, scored and sampled.

    They are what the template adds to the question's tokens, or, where the tokenizer would merge the two, those of the
    answer by itself: a question is always read by itself.
    """
    [asked], (before, after) = rendered(tokenizer, [[QUESTION]]), around_answers(tokenizer)
    answer = before + response + after + tokenizer.eos_token
    question, whole, alone = ids_of(tokenizer, [asked, asked + answer, answer])
    return whole[len(question) :] if whole[: len(question)] == question else alone


def answer_texts(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Sampled answers as text, without their end token and what the template puts around every answer.

    Any other special token stays visible, and is no label.
    """
    before, after = around_answers(tokenizer)
    ended = [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
    texts = tokenizer.batch_decode(ended, skip_special_tokens=False)
    return [text.removeprefix(before).removesuffix(after) for text in texts]


def settle_chats(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make ``tokenizer`` begin and end an answer where its chat template does.

    The end of a turn becomes its end token, which in many chat models is another than the end of a text; rows are
    filled up with the end token where no other is named. A prompt that opens thoughts, of which no demonstration has
    any, is cut back to where answers begin; a template that writes the date always writes the same one.
    Raises ValueError where an answer has no end.
    """
    if "strftime_now" in tokenizer.chat_template:
        tokenizer.chat_template = f"{{%- macro strftime_now(_) -%}}{DAY}{{%- endmacro -%}}{tokenizer.chat_template}"
    [asked], [whole] = rendered(tokenizer, [[QUESTION]]), rendered(tokenizer, [[QUESTION, ANSWER]], asking=False)
    begun, _, rest = whole.rpartition(ANSWER["content"])
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    ends = [added[number] for number in ids_of(tokenizer, [rest])[0] if number in added]
    if not ends and tokenizer.eos_token is None:
        raise ValueError("neither its chat template nor an eos_token says how an answer ends")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or ends[0]
    tokenizer.eos_token = (ends or [tokenizer.eos_token])[0]
    begun = begun.rstrip(" ")  # a space before an answer is part of its first token
    if asked.rstrip(" ") != begun:
        same = len(os.path.commonprefix([asked, begun]))
        asking = f"written.removesuffix({asked[same:]!r}) + {begun[same:]!r}"
        tokenizer.chat_template = (
            f"{{% set written %}}{tokenizer.chat_template}{{% endset %}}"
            f"{{{{ {asking} if add_generation_prompt else written }}}}"
        )


def check_chats(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentences: Iterable[str]) -> None:
    """Raise ValueError unless the template writes all answers as they are, and all ``sentences`` are text.

    Otherwise the model would be taught other answers than those that earn, or asked in another form.
    """
    [asked], (before, _) = rendered(tokenizer, [[QUESTION]]), around_answers(tokenizer)
    for response in responses(prompt):
        [whole] = rendered(tokenizer, [[QUESTION, ANSWER | {"content": response}]], asking=False)
        [read] = answer_texts(tokenizer, [response_ids(tokenizer, response)])
        if read != response or not whole.startswith(asked + before + response):
            raise ValueError(
                f"The chat template or the tokenizer changes the answer {response!r}; choose other answer words or "
                f"another chat template."
            )
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for sentence in sentences if special else []:
        if found := re.search("|".join(map(re.escape, special)), sentence):
            raise ValueError(f"{sentence!r} holds {found[0]!r}, which the tokenizer reads as no text; leave it out.")


def parse_strict(prompt: Prompt, answer: str) -> int | None:
    """Label of an answer that is exactly one of the responses, else None (the paper's training reward)."""
    return {text: label for label, text in enumerate(responses(prompt))}.get(answer)


def parse_other_wording(prompt: Prompt, answer: str) -> int | None:
    """Label of an answer that is exactly one of the responses in the other wording, else None."""
    return {text: label for label, text in enumerate(other_wordings(prompt))}.get(answer)


def parse_robust(prompt: Prompt, answer: str) -> int | None:
    """Label whose words are mentioned last in the answer, else None (the paper's evaluation).

    Words are read as words: in any case, whatever punctuation is beside them, also where the prompt's own answer has
    some ("Yes, it is" says "Yes."). A single letter must be as it is written ("a verb" does not say A). In scripts that
    put no spaces between words, words may be anywhere.
    """
    mentions = list(mentions_of(responses(prompt)).finditer(answer))
    return int(str(mentions[-1].lastgroup).removeprefix("label")) if mentions else None


@lru_cache
def mentions_of(answers: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the words of answers in a text, each as a group named by its label, the longer one first."""
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
