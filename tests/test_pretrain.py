"""The embedded base: what its loss counts, what it may read, and when pretraining ends."""

import pandas as pd
import pytest
import torch

from nondecoupling.study.study import load_study
from nondecoupling.task import prompts
from nondecoupling.training import pretrain


@pytest.fixture(scope="module")
def model(nano_tokenizer):
    return pretrain.new_model(load_study("tiny").profile.pretrain, nano_tokenizer).eval()


@pytest.fixture
def grow(tmp_path):
    """Pretrains on 300 sentences with some other settings changed, and returns the probe's history."""
    settings = load_study("tiny").profile

    def grow(**changes):
        changed = settings.pretrain.model_copy(update={"corpus_size": 300} | changes)
        return pretrain.pretrain(changed, settings.prompt, settings.evaluation, set(), tmp_path / "policy")

    return grow


def test_the_loss_is_the_weighted_mean_over_tokens_without_padding(model):
    rows = [([5, 6, 7, 8, 9], [0.0, 0.0, 0.0, 1.0, 1.0]), ([10, 11, 12], [0.3, 0.3, 0.3])]
    total = weights = 0.0
    with torch.no_grad():
        for ids, weight in rows:
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            for place in range(1, len(ids)):
                total -= weight[place] * logp[place - 1, ids[place]].item()
                weights += weight[place]
        assert pretrain.weighted_loss(model, rows, pad=0).item() == pytest.approx(total / weights, rel=1e-5)


def test_chats_count_the_answer_only_and_text_counts_whole(nano_tokenizer, nano_prompt):
    [(ids, weights), (other, _)] = pretrain.encode_chats(
        nano_tokenizer, nano_prompt, [("The boys slept.", 1), ("The boys slept.", 0)]
    )
    [question] = prompts.prompt_ids(nano_tokenizer, nano_prompt, ["The boys slept."])
    answer = prompts.response_ids(nano_tokenizer, "acceptable")
    assert ids == question + answer
    assert weights == [0.0] * len(question) + [1.0] * len(answer)
    assert other == question + prompts.response_ids(nano_tokenizer, "unacceptable")
    text, weights = pretrain.encode_text(nano_tokenizer, "The boys slept.", 0.3)
    assert nano_tokenizer.decode(text) == "The boys slept.<|endoftext|>"
    assert weights == [0.3] * len(text)


def test_the_base_reads_no_sentence_of_the_study():
    settings = load_study("tiny").profile.pretrain
    exclude = set(pretrain.pretraining_sentences(settings, set())["sentence"][:500])  # it would read them otherwise
    read = pretrain.pretraining_sentences(settings, exclude)
    assert len(read) == read["sentence"].nunique() == settings.corpus_size + settings.probe_size
    assert not exclude & set(read["sentence"])
    assert read["label"].mean() == 0.5
    assert ((read["mark"] == "") == (read["label"] == 1)).all()


def test_the_probe_is_balanced_accuracy(grow, monkeypatch):
    labels, logp = [1, 1, 1, 0], [-0.1, -3.0, -0.2, -2.0]
    table = pd.DataFrame({"label": labels, "logp_acceptable": logp, "logp_unacceptable": -1.0})
    monkeypatch.setattr(pretrain, "predict", lambda *_: table)
    assert grow(probe_every=1)["probe"].tolist() == [pytest.approx((2 / 3 + 1) / 2)]


@pytest.mark.parametrize("probe_every", [1, 5])
def test_pretraining_that_does_not_reach_its_target_says_what_to_change(grow, tmp_path, probe_every):
    with pytest.raises(RuntimeError, match=r"below pretrain\.probe_target=1\.0; raise pretrain\.max_steps"):
        grow(max_steps=2, probe_every=probe_every, probe_target=1.0)
    assert not (tmp_path / "policy").exists()


def test_a_finished_base_is_saved_in_the_standard_layout(built_base):
    names = {path.name for path in (built_base / "policy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
