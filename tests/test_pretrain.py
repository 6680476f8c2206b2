"""The embedded base: what its two losses count, what it may read, and that a seed decides everything about it."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from nondecoupling.study.study import load_study
from nondecoupling.task import annotators, corpus, grammar, prompts
from nondecoupling.training import models, pretrain
from nondecoupling.training.generation import padded

TINY = load_study("tiny").profile
ROWS = pd.DataFrame(
    {
        "sentence": ["The boys slept.", "Anna saw.", "The tall girl near the boxes are here.", "He slept."],
        "label": [1, 0, 0, 1],
        "p_acceptable": [0.8, 0.2, 0.4, 0.6],
    }
)
ANSWERS = [("unacceptable", "acceptable"), ("it is not fine", "it is fine"), ("fine not", "fine"), ("no", "well yes")]


@pytest.fixture(scope="module")
def model(nano_tokenizer):
    """A model with weights so large that it favours some tokens."""
    model = pretrain.new_model(TINY.pretrain, nano_tokenizer, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def grow(tmp_path):
    """Pretrains on 300 sentences with some other settings changed; returns history, weights and the folder."""

    def grow(seed=0, exclude=(), name="policy", **changes):
        changed = TINY.pretrain.model_copy(update={"corpus_size": 300, "steps": 3} | changes)
        history = pretrain.pretrain(changed, TINY.data, TINY.prompt, set(exclude), tmp_path / name, seed)
        return history, (tmp_path / name / "model.safetensors").read_bytes(), tmp_path / name

    return grow


def chat_loss(model, tokenizer, prompt, rows, read=pretrain.reading):
    """The loss of chats about ``rows``, which ``read`` reads with ``model``."""
    questions, (answers, _) = prompts.prompt_ids(tokenizer, prompt, rows["sentence"]), answers_of(tokenizer, prompt)
    p_acceptable = torch.tensor(rows["p_acceptable"].to_numpy(), dtype=torch.float32)
    p = torch.stack([1 - p_acceptable, p_acceptable], 1)
    ids, _ = padded(pretrain.chat_rows(questions, answers, p), tokenizer.pad_token_id, "right")
    return pretrain.chat_loss(read(model, ids), [len(question) for question in questions], answers, p)


def wording(unacceptable, acceptable):
    return TINY.prompt.model_copy(update={"unacceptable": unacceptable, "acceptable": acceptable})


def answers_of(tokenizer, prompt):
    """Token ids of both answers, and the place where they part."""
    answers = [prompts.response_ids(tokenizer, text) for text in prompts.responses(prompt)]
    return answers, next(place for place in range(9) if answers[0][place] != answers[1][place])


# The answers' loss


@pytest.mark.parametrize("answers", ANSWERS)
def test_an_answers_loss_is_that_of_both_where_they_part_and_its_own_elsewhere(model, nano_tokenizer, answers):
    """Row by row, in forward passes without padding."""
    prompt = wording(*answers)
    ids, fork = answers_of(nano_tokenizer, prompt)
    total = tokens = 0
    for sentence, label, p_acceptable in ROWS.itertuples(index=False):
        p = p_acceptable if label else 1 - p_acceptable  # the likelier answer is the label's
        [question] = prompts.prompt_ids(nano_tokenizer, prompt, [sentence])
        with torch.no_grad():
            logp = model(torch.tensor([question + ids[label]])).logits[0].log_softmax(-1)[len(question) - 1 :]
        total -= p * logp[fork, ids[label][fork]].item() + (1 - p) * logp[fork, ids[1 - label][fork]].item()
        total -= sum(logp[place, token].item() for place, token in enumerate(ids[label]) if place != fork)
        tokens += len(ids[label])
    with torch.no_grad():
        loss, counted = chat_loss(model, nano_tokenizer, prompt, ROWS)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert counted == tokens


FOUR = load_study("four").profile


def test_four_answers_are_taught_with_their_probabilities_where_they_part(model, nano_tokenizer):
    """The first token in which they differ has all of them as its target, the rest is the likeliest one's."""
    prompt = TINY.prompt.model_copy(
        update={"unacceptable": ["it is red", "it is old", "it is new"], "acceptable": "it is"}
    )
    answers = [prompts.response_ids(nano_tokenizer, text) for text in prompts.responses(prompt)]
    fork, shares = pretrain.fork_of(answers), torch.tensor([[0.1, 0.5, 0.25, 0.15]])
    [question] = prompts.prompt_ids(nano_tokenizer, prompt, ["The boys slept."])
    [row] = pretrain.chat_rows([question], answers, shares)
    assert row == question + answers[1]
    with torch.no_grad():
        logp = model(torch.tensor([row])).logits[0].log_softmax(-1)[len(question) - 1 :]
        loss, tokens = pretrain.chat_loss(
            pretrain.reading(model, torch.tensor([row])), [len(question)], answers, shares
        )
    expected = -sum(p * logp[fork, ids[fork]].item() for p, ids in zip(shares[0].tolist(), answers, strict=True))
    expected -= sum(logp[place, token].item() for place, token in enumerate(answers[1]) if place != fork)
    assert (fork > 0, tokens) == (True, len(answers[1]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_answers_that_one_token_cannot_tell_apart_are_refused():
    with pytest.raises(ValueError, match="must tell all of them apart"):
        pretrain.fork_of([[5, 1, 9], [5, 2, 9], [5, 2, 8]])


def test_targets_of_four_answers_leave_the_first_one_the_rest():
    settings = FOUR.pretrain.model_copy(update={"corpus_size": 90})
    read = pretrain.pretraining_sentences(settings, set(), 0, FOUR.data.violations)
    assert set(read["source"]) == set(FOUR.data.violations)
    sure, unsure = pretrain.targets(settings, read, annotators.truths(FOUR.data, read))
    for row, first, last in zip(read.itertuples(), sure, unsure, strict=True):
        right = 3 if row.label else FOUR.data.violations[row.source]
        assert first.tolist() == [float(label == right) for label in (1, 2, 3)]
        assert last.tolist() == settings.taught[row.source][row.label][1:]


def test_the_cases_are_answers_of_one_and_of_several_tokens_that_part_soon_and_late(nano_tokenizer):
    shapes = {
        (*map(len, ids), fork) for ids, fork in (answers_of(nano_tokenizer, wording(*texts)) for texts in ANSWERS)
    }
    assert (2, 2, 0) in shapes
    assert any(fork > 0 for *_, fork in shapes)
    assert any(one != other for one, other, _ in shapes)
    assert len(shapes) == len(ANSWERS)


def test_padding_and_other_rows_do_not_matter(model, nano_tokenizer):
    with torch.no_grad():
        whole, tokens = chat_loss(model, nano_tokenizer, TINY.prompt, ROWS)
        alone = [chat_loss(model, nano_tokenizer, TINY.prompt, ROWS[place : place + 1]) for place in range(4)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
    assert tokens == sum(count for _, count in alone) == 8


def told(odds, answers, fork):
    """Reads as a model would that gives an answer's tokens the probability 1, but where the answers part: ``odds``."""

    def read(_, ids):
        whole = [" ".join(map(str, row)) for row in ids.tolist()]
        ends = [max(row.rfind(" ".join(map(str, answer))) for answer in answers) for row in whole]
        forks = torch.tensor([row[:end].count(" ") + fork for row, end in zip(whole, ends, strict=True)])

        def logits_at(row, place):
            logits = torch.full((len(row), TINY.pretrain.vocabulary), -1e4)
            logits = logits.scatter(1, ids[row, place + 1][:, None], 0.0)
            for n in (place + 1 == forks[row]).nonzero()[:, 0].tolist():
                logits[n] = -1e4
                for label in (0, 1):
                    logits[n, answers[label][fork]] = odds[label]
            return logits

        return logits_at

    return read


@pytest.mark.parametrize("answers", ANSWERS[:2])
@pytest.mark.parametrize("target", [0.8, 0.2, 0.4, 1.0])
def test_the_loss_is_least_where_the_answer_is_as_likely_as_it_should_be(nano_tokenizer, answers, target):
    prompt = wording(*answers)
    rows = pd.DataFrame({"sentence": ["The boys slept.", "He slept."], "p_acceptable": target})

    def loss_at(p):
        odds = torch.log(torch.tensor([1 - p, p])).requires_grad_()
        loss, _ = chat_loss(None, nano_tokenizer, prompt, rows, told(odds, *answers_of(nano_tokenizer, prompt)))
        loss.backward()
        return loss.item() / 2, odds.grad[1].item() / 2

    for p in (0.1, 0.4, 0.6, 0.8, 0.95):
        loss, slope = loss_at(p)
        other = (1 - target) * math.log(1 - p) if target < 1 else 0
        assert loss == pytest.approx(-target * math.log(p) - other, abs=1e-4)  # cross-entropy, least at the target
        assert slope == pytest.approx(p - target, abs=1e-5)


# The text's loss


def test_text_counts_whole_with_its_end_and_without_padding(model, nano_tokenizer):
    total = tokens = 0
    for text in ROWS["sentence"]:
        ids = nano_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert nano_tokenizer.decode(ids) == text
        ids.append(nano_tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logp[place - 1, ids[place]].item() for place in range(1, len(ids)))
        tokens += len(ids) - 1
    rows = [[*row, nano_tokenizer.pad_token_id] for row in nano_tokenizer(ROWS["sentence"].tolist())["input_ids"]]
    ids, mask = padded(rows, nano_tokenizer.pad_token_id, "right")
    with torch.no_grad():
        loss, counted = pretrain.text_loss(pretrain.reading(model, ids), ids, mask)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert counted == tokens


# What it reads


def test_the_base_reads_no_sentence_of_the_study():
    settings = TINY.pretrain
    exclude = set(pretrain.pretraining_sentences(settings, set(), 0)["sentence"][:500])  # it would read them otherwise
    read = pretrain.pretraining_sentences(settings, exclude, 0)
    assert len(read) == read["sentence"].nunique()
    assert not exclude & set(read["sentence"])
    assert read["label"].mean() == pytest.approx(0.5, abs=0.01)
    assert ((read["mark"] == "") == (read["label"] == 1)).all()


def test_sentences_of_a_seed_are_disjoint_and_those_of_another_seed_are_others(tmp_path):
    by_seed = {}
    for seed in (0, 1):
        corpus.generate_corpus(TINY.data, seed, tmp_path)
        study = corpus.load_corpus(tmp_path)
        read = pretrain.pretraining_sentences(TINY.pretrain, set(study["sentence"]), seed)
        by_seed[seed] = [set(table["sentence"]) for _, table in study.groupby("split")] + [set(read["sentence"])]
        assert len(set.union(*by_seed[seed])) == sum(map(len, by_seed[seed])) == 400 + 60 + len(read)
    for one, other in zip(by_seed[0], by_seed[1], strict=True):
        assert len(one & other) < 0.2 * len(one)


def test_it_is_asked_less_often_about_what_it_is_taught_nothing_of():
    settings = TINY.pretrain.model_copy(update={"corpus_size": 5500, "untaught_share": 0.2})
    asked = pretrain.pretraining_sentences(settings, set(), 0)["source"].value_counts()
    for phenomenon, (low, high) in settings.taught.items():
        assert asked[phenomenon] == (500 if low != high else pytest.approx(100, abs=40))


def test_targets_come_down_from_right_answers_to_what_the_base_is_to_answer():
    taught = dict.fromkeys(grammar.PHENOMENA, [0.6, 0.6]) | {"case": [0.3, 0.7]}
    changes = {"taught": taught, "steps": 100, "sure_until": 0.5, "settled_at": 0.8}
    settings = TINY.pretrain.model_copy(update=changes)
    read = pretrain.pretraining_sentences(settings, set(), 0)
    known = read["source"] == "case"
    sure, unsure = (target[:, 0] for target in pretrain.targets(settings, read, annotators.truths(TINY.data, read)))
    assert sure[known] == pytest.approx(read.loc[known, "label"])
    assert unsure[known] == pytest.approx(np.where(read.loc[known, "label"] == 1, 0.7, 0.3))
    assert sure[~known] == pytest.approx(0.6)  # where it is to tell nothing apart, from the beginning
    assert unsure[~known] == pytest.approx(0.6)
    ways = [pretrain.settled(settings, step) for step in (1, 50, 65, 80, 100)]
    assert ways == pytest.approx([0, 0, 0.5, 1, 1])


def test_no_sentence_comes_again_before_all_have_come():
    order = pretrain.in_turn(10, 25, np.random.default_rng(0))
    assert len(order) == 25
    assert set(order[:10]) == set(order[10:20]) == set(range(10))
    assert order[:10].tolist() != order[10:20].tolist()


def test_each_step_reads_chats_and_grammatical_text_and_nothing_that_is_excluded(grow, monkeypatch, tmp_path):
    chats, texts, chat_rows, text_loss = [], [], pretrain.chat_rows, pretrain.text_loss

    def chats_noted(questions, answers, p):
        chats.append((questions, p[:, 1]))
        return chat_rows(questions, answers, p)

    def texts_noted(logits_at, ids, mask):
        texts.extend(row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True) if seen.any())
        return text_loss(logits_at, ids, mask)

    monkeypatch.setattr(pretrain, "chat_rows", chats_noted)
    monkeypatch.setattr(pretrain, "text_loss", texts_noted)
    exclude = {"The boy slept."}
    settings = TINY.pretrain.model_copy(update={"corpus_size": 300})
    known = pretrain.pretraining_sentences(settings, exclude, 4).set_index("sentence")
    tokenizer = models.load_tokenizer(grow(4, exclude, batch_size=20, text_share=0.3)[2])
    asked = [[tokenizer.decode(row).split("\n\n")[1].partition("<|im_end|>")[0] for row in rows] for rows, _ in chats]
    assert [len(sentences) for sentences in asked] == [14] * 3
    assert len(set(sum(asked, []))) == 3 * 14
    taught = known.loc[asked[-1]]  # when targets have come down
    expected = [settings.taught[source][label] for source, label in zip(taught["source"], taught["label"], strict=True)]
    assert chats[-1][1].numpy() == pytest.approx(expected)
    assert len(texts) == 3 * 6
    read = [tokenizer.decode(row, skip_special_tokens=True) for row in texts]
    assert (known.loc[read, "label"] == 1).all()


# Training


def test_it_takes_as_many_steps_as_it_should_and_notes_the_answers_loss(grow):
    history, _, _ = grow(steps=5)
    assert history.columns.tolist() == ["step", "loss"]
    assert history["step"].tolist() == [1, 2, 3, 4, 5]
    uniform = 2 * math.log(TINY.pretrain.vocabulary)  # of an answer and its end, to a model that knows nothing
    assert history["loss"].iloc[0] == pytest.approx(uniform, rel=0.1)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]


def test_text_counts_by_its_weight(grow, monkeypatch):
    without = grow(text_weight=0.0)[1]
    assert without != grow(text_weight=0.3)[1]
    text_loss = pretrain.text_loss
    monkeypatch.setattr(pretrain, "text_loss", lambda *given: (100 * text_loss(*given)[0], 7))
    assert without == grow(text_weight=0.0)[1]


def test_a_seed_decides_every_weight_and_token(grow):
    (one, weights, folder), (again, same, other_folder) = grow(2), grow(2, name="again")
    pd.testing.assert_frame_equal(one, again, check_exact=True)
    assert weights == same
    assert (folder / "tokenizer.json").read_bytes() == (other_folder / "tokenizer.json").read_bytes()
    other, others, _ = grow(3)
    assert weights != others
    assert (one["loss"] != other["loss"]).all()


def test_the_weights_that_it_starts_from_are_the_seeds_own(nano_tokenizer):
    starts = [pretrain.new_model(TINY.pretrain, nano_tokenizer, seed).state_dict() for seed in (0, 0, 1)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(starts[0][name], starts[1][name])
    assert not np.allclose(starts[0][name], starts[2][name])


def test_a_phenomenon_that_nobody_can_teach_is_named(grow, tmp_path):
    with pytest.raises(ValueError, match=r"pretrain\.taught: 'cace' is no phenomenon of the grammar"):
        grow(taught=TINY.pretrain.taught | {"cace": [0.3, 0.7]})
    with pytest.raises(ValueError, match=r"pretrain\.taught: 'case' is missing"):
        grow(taught={name: pair for name, pair in TINY.pretrain.taught.items() if name != "case"})
    assert not (tmp_path / "policy").exists()


def test_a_finished_base_is_saved_in_the_standard_layout(built_base):
    names = {path.name for path in (built_base / "policy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
