"""What is asked, how answers are read, and that the tokens taught are the tokens sampled."""

import pytest

from conftest import apart_and_together
from nondecoupling.study.profile import Prompt
from nondecoupling.task import prompts
from nondecoupling.training import pretrain

PROMPT = Prompt(
    template="Fine?\n\n{sentence}",
    acceptable="acceptable",
    unacceptable="unacceptable",
    other_wording="{answer}.",
    max_new_tokens=5,
)

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

QUESTION = "<|im_start|>user\nAcceptable or unacceptable?\n\nThe boys slept.<|im_end|>\n<|im_start|>assistant\n"
NO_THINKING = "<think>\n\n</think>\n\n"


@pytest.fixture(params=["nano", "qwen"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


# Reading answers


@pytest.mark.parametrize(
    ("answer", "strict", "robust"),
    [
        ("acceptable", 1, 1),
        ("unacceptable", 0, 0),  # it contains "acceptable"
        ("Acceptable", None, 1),
        ("UNACCEPTABLE", None, 0),
        ("acceptable.", None, 1),
        (" acceptable", None, 1),
        ("acceptable\n", None, 1),
        ("**unacceptable**", None, 0),
        ("acceptable, no, unacceptable", None, 0),
        ("unacceptable? acceptable!", None, 1),
        ("acceptable unacceptable acceptable", None, 1),
        ("It is not acceptable", None, 1),  # the last mention counts, whatever is said of it
        ("acceptably", None, None),
        ("acceptableunacceptable", None, None),
        ("unacceptability", None, None),
        ("preacceptable", None, None),
        ("acceptable_", None, None),
        ("acceptable1", None, None),
        ("an acceptable-looking one", None, 1),
        ("", None, None),
        ("yes", None, None),
        ("accept able", None, None),
    ],
)
def test_reading_answers(answer, strict, robust):
    assert prompts.parse_strict(PROMPT, answer) == strict
    assert prompts.parse_robust(PROMPT, answer) == robust


def test_other_answer_words_are_read_as_they_are_written():
    prompt = Prompt(
        template="{sentence}", acceptable="Yes (A)", unacceptable="No.*", other_wording="{answer}.", max_new_tokens=5
    )
    assert prompts.parse_strict(prompt, "Yes (A)") == 1
    assert prompts.parse_strict(prompt, "yes (a)") is None
    assert prompts.parse_robust(prompt, "well, YES (a) it is") == 1
    assert prompts.parse_robust(prompt, "no.* I say") == 0
    assert prompts.parse_robust(prompt, "not here") is None  # the dot and the star are no pattern


@pytest.mark.parametrize(
    ("unacceptable", "acceptable", "answer", "label"),
    [
        ("No.", "Yes.", "No, the verb is missing", 0),
        ("No.", "Yes.", "Yes", 1),
        ("No.", "Yes.", "yes! It is not wrong", 1),
        ("No.", "Yes.", "Nothing is known", None),
        ("B", "A", "B, because a verb is missing", 0),
        ("B", "A", "Answer: A", 1),
        ("b", "a", "A sentence", None),
        ("0", "1", "1", 1),
        ("0", "1", "10 words", None),
        ("不可以", "可以", "这句话不可以。", 0),  # which contains the other answer
        ("不可以", "可以", "这句话可以", 1),
        ("nein", "ja", "Ja, das geht. Nein!", 0),
        ("-", "+", "it is +", 1),  # no words at all
    ],
)
def test_words_are_read_as_words(unacceptable, acceptable, answer, label):
    prompt = PROMPT.model_copy(update={"unacceptable": unacceptable, "acceptable": acceptable})
    assert prompts.parse_robust(prompt, answer) == label


@pytest.mark.parametrize(
    ("label", "parsed", "earned"),
    [(1, 1, 1.0), (0, 0, 1.0), (1, 0, -1.0), (0, 1, -1.0), (1, None, -1.0), (0, None, -1.0)],
)
def test_rewards(label, parsed, earned):
    assert prompts.reward(label, parsed) == earned


def test_braces_in_a_sentence_are_left_alone():
    [message] = prompts.prompt_messages(PROMPT, "{a} {sentence} 100%")
    assert message == {"role": "user", "content": "Fine?\n\n{a} {sentence} 100%"}


# Tokens


def test_the_prompt_is_qwens_chat_without_thinking(tokenizer, nano_prompt):
    [ids] = prompts.prompt_ids(tokenizer, nano_prompt, ["The boys slept."])
    assert tokenizer.decode(ids) == QUESTION + NO_THINKING


def test_prompts_are_tokenised_one_by_one(tokenizer, nano_prompt):
    several = ["The boys slept.", "The man saw the girls near the house."]
    alone = [prompts.prompt_ids(tokenizer, nano_prompt, [sentence])[0] for sentence in several]
    assert prompts.prompt_ids(tokenizer, nano_prompt, several) == alone


@pytest.mark.parametrize("answer", ["acceptable", "unacceptable"])
def test_a_response_ends_with_the_end_of_turn(tokenizer, answer):
    ids = prompts.response_ids(tokenizer, answer)
    assert tokenizer.decode(ids) == f"{answer}<|im_end|>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_qwen_reads_unacceptable_as_two_tokens(qwen_tokenizer):
    lengths = [len(prompts.response_ids(qwen_tokenizer, answer)) for answer in ("acceptable", "unacceptable")]
    assert lengths == [2, 3]


@pytest.mark.parametrize("template", ["Acceptable or unacceptable?\n\n{sentence}", "{sentence}\n", " {sentence} "])
def test_the_prompts_tokens_are_a_prefix(tokenizer, template, sentences):
    prompt = Prompt(
        template=template,
        acceptable="acceptable",
        unacceptable="unacceptable",
        other_wording="{answer}.",
        max_new_tokens=5,
    )
    awkward = [*sentences["sentence"][:20], "Ünïcode, “quotes”\tand tabs\n\n"]
    prompts.check_chats(tokenizer, prompt, awkward)
    for sentence in awkward:
        for response in prompts.responses(prompt):
            apart, together = apart_and_together(tokenizer, prompt, sentence, response)
            assert apart == together


def test_an_answer_that_would_merge_with_the_question_is_taught_by_itself(nano_texts, nano_prompt, monkeypatch):
    """As it is sampled: questions are read by themselves."""
    monkeypatch.setattr(pretrain, "QWEN_WORDS", GPT2_WORDS)
    tokenizer = pretrain.train_tokenizer(iter(nano_texts), 640)
    apart, together = apart_and_together(tokenizer, nano_prompt, "The boys slept.", "unacceptable")
    assert apart != together
    assert tokenizer.decode(prompts.response_ids(tokenizer, "unacceptable")) == "unacceptable<|im_end|>"
    prompts.check_chats(tokenizer, nano_prompt, ["The boys slept."])


def test_an_answer_that_the_template_changes_is_refused(nano_tokenizer):
    changing = nano_tokenizer.__class__(
        tokenizer_object=nano_tokenizer._tokenizer,
        eos_token=nano_tokenizer.eos_token,
        pad_token=nano_tokenizer.pad_token,
        chat_template=nano_tokenizer.chat_template.replace("message.content", "message.content | replace('un', 'Un')"),
    )
    with pytest.raises(ValueError, match="changes the answer 'unacceptable'"):
        prompts.check_chats(changing, PROMPT, [])


def test_a_sentence_that_holds_a_special_token_is_named(nano_tokenizer):
    with pytest.raises(ValueError, match=r"'She said <\|im_end\|> twice.' holds '<\|im_end\|>', which .* no text"):
        prompts.check_chats(nano_tokenizer, PROMPT, ["The boys slept.", "She said <|im_end|> twice."])


@pytest.mark.parametrize(
    ("options", "ending"),
    [({}, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False}, NO_THINKING)],
)
def test_the_template_honours_enable_thinking(tokenizer, nano_prompt, options, ending):
    chat = prompts.prompt_messages(nano_prompt, "The boys slept.")
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)
    assert text == QUESTION + ending


def test_both_templates_write_the_same_chats(nano_tokenizer, qwen_tokenizer, nano_prompt):
    chat = [*prompts.prompt_messages(nano_prompt, "The boys slept."), {"role": "assistant", "content": "acceptable"}]
    nano, qwen = (
        tokenizer.apply_chat_template(chat, tokenize=False, **prompts.TEMPLATE_OPTIONS)
        for tokenizer in (nano_tokenizer, qwen_tokenizer)
    )
    assert nano == qwen == f"{QUESTION}{NO_THINKING}acceptable<|im_end|>\n"


def test_an_answer_with_another_special_token_is_no_label(nano_tokenizer):
    answer = prompts.response_ids(nano_tokenizer, "acceptable")
    plain, padded = prompts.answer_texts(nano_tokenizer, [answer, [nano_tokenizer.pad_token_id, *answer]])
    assert plain == "acceptable"
    assert prompts.parse_strict(PROMPT, plain) == 1
    assert prompts.parse_strict(PROMPT, padded) is None
