"""The paper's setting on a CPU: Qwen3-0.6B's tokenizer, chat template and architecture, CoLA's sentences, LoRA, 8 bits.

Only the weights are small and random (two layers, width 64): the code path is the paper profile's, from loading to the
written run.
"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from conftest import SHARED, apart_and_together, make_base, make_data, results_in
from nondecoupling.study import folders
from nondecoupling.study.profile import Model
from nondecoupling.study.study import load_study
from nondecoupling.task import corpus, prompts
from nondecoupling.training import models
from nondecoupling.training.evaluation import predict
from nondecoupling.training.stage import prepare_stage, publish_stage
from nondecoupling.training.trainer import kept_in_float32
from trainers import train, trainer_of

SHORT = {
    "data.expect": "any",  # its first rows
    "model.dtype": "float32",
    "prompt.max_new_tokens": 4,  # one more than the longer answer
    "sft.steps": 20,
    "sft.batch_size": 8,
    "sft.learning_rate": 3.0e-2,
    "rl.steps": 3,
    "rl.prompts_per_step": 4,
    "rl.least_rewarded": 0.0,
    "joint.steps": 2,
    "joint.prompts_per_step": 2,
    "reward_model.steps": 2,
    "evaluation.points": 2,
    "evaluation.along_size": 12,
    "evaluation.train_size": 12,
}
PLAIN = Model(folder=None, quantization="none", dtype="float32")
EIGHT_BIT = Model(folder=None, quantization="8bit", dtype="float32")


@pytest.fixture(scope="module")
def small_qwen(qwen_tokenizer, tmp_path_factory):
    """Qwen3-0.6B's folder with a model of the same architecture, cut to two layers and a narrow width."""
    source, folder = SHARED / "qwen3-0.6b", tmp_path_factory.mktemp("models") / "qwen3"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    cut = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 16}
    wide = {"initializer_range": 0.3}  # else so narrow a model could not favour any of 151,936 tokens
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    set_seed(0)
    whole = json.loads((source / "config.json").read_text())
    config = AutoConfig.for_model(**whole | cut | heads | wide)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_cola(cola, tmp_path_factory):
    """The first rows of CoLA's files: enough for a few steps."""
    folder = tmp_path_factory.mktemp("data") / "cola"
    folder.mkdir()
    for name, rows in (("in_domain_train.tsv", 800), ("in_domain_dev.tsv", 24)):
        lines = (cola / name).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


FIRST = ("sft", "sft-rl")
CONTROLS = ("reward-model", "sft-rl-proxy", "sft-rl-rloo", "joint-m0.5")  # one of each kind, in 8 bits


@pytest.fixture(scope="module", params=["none", "8bit"])
def stages(request, small_qwen, small_cola, tmp_path_factory):
    """Finished runs of the paper profile, shortened, as {run: (stage, first adapter, outcome, folder)}."""
    changes, finished = SHORT | {"model.quantization": request.param}, {}
    study = load_study("paper", str(small_cola), str(small_qwen), changes)
    with results_in(tmp_path_factory.mktemp("results")):
        make_data(study)
        make_base(study)
        for run in FIRST + (CONTROLS if request.param == "8bit" else ()):
            stage = prepare_stage(study, run, 0, expected=study.run(run).stage)
            start = adapter(stage.policy)
            outcome = train(stage)
            finished[run] = stage, start, outcome, publish_stage(stage, outcome)
    return finished


def adapter(policy, name="default"):
    """A copy of an adapter's weights."""
    return {k: v.detach().clone() for k, v in policy.state_dict().items() if f".{name}." in k}


def test_controls_of_the_papers_setting_train_float32_adapters_and_end_with_numbers(stages):
    for run in stages.keys() & set(CONTROLS):
        stage, start, outcome, folder = stages[run]
        trained = {name: weight for name, weight in stage.policy.named_parameters() if weight.requires_grad}
        assert {weight.dtype for weight in trained.values()} == {torch.float32}, run
        assert any(not torch.equal(start[name], weight) for name, weight in trained.items() if name in start), run
        assert np.isfinite(outcome.trajectory.to_numpy()).all(), run
        assert folders.is_complete(folder)
    if "sft-rl-proxy" in stages:
        assert stages["sft-rl-proxy"][2].log["rewards/proxy/mean"].notna().all()


# Prompt and tokens


def test_the_prompt_is_this_text_and_these_tokens(qwen_tokenizer):
    prompt = load_study("paper").profile.prompt
    ids = prompts.prompt_ids(qwen_tokenizer, prompt, ["The boys slept."])[0]
    assert qwen_tokenizer.decode(ids) == (
        "<|im_start|>user\nIs this sentence acceptable English? Answer with one word, acceptable or unacceptable.\n\n"
        "The boys slept.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert ids[:3] == [151644, 872, 198]  # <|im_start|>, user, newline
    assert ids[-9:] == [151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]
    assert prompts.response_ids(qwen_tokenizer, "acceptable") == [37016, 151645]
    assert len(prompts.response_ids(qwen_tokenizer, "unacceptable")) == 3


def test_prompt_and_answer_apart_are_the_tokens_of_both_together(qwen_tokenizer, cola):
    prompt = load_study("paper").profile.prompt
    for sentence in corpus.load_corpus(cola)["sentence"].sample(200, random_state=0):
        for response in prompts.responses(prompt):
            apart, together = apart_and_together(qwen_tokenizer, prompt, sentence, response)
            assert apart == together


def test_what_the_docs_derive_of_the_papers_setting_follows_from_its_numbers():
    text = (folders.REPOSITORY / "docs" / "paper-setting.md").read_text(encoding="utf-8")
    profile, sentences = load_study("paper").profile, 8551
    sft, rl = profile.sft, profile.rl
    assert sft.steps == round(2 * sentences / sft.batch_size)
    assert rl.steps == round(2 * sentences / rl.prompts_per_step)
    read, sampled = 2 * sft.steps * sft.batch_size, 2 * rl.steps * rl.prompts_per_step * rl.answers_per_prompt
    shape = json.loads((SHARED / "qwen3-0.6b" / "config.json").read_text()) if SHARED.exists() else None
    said = [
        f"are {sft.steps}.",
        f"are {rl.steps}.",
        f"reads\n  {read:,} demonstrations",
        f"samples {sampled:,} answers",
    ]
    said.append(f"RL takes {sampled / 62 / 60:.0f} minutes a seed")
    if shape:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
        embeddings = model.get_input_embeddings().weight.numel()
        linear = sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
        rows = sum(sum(weight.shape) for name, weight in model.named_parameters() if "_proj" in name)
        adapter = profile.adaptation.rank * rows
        said.append(f"{linear / 1e6:.0f} million in 8 bits, and {embeddings / 1e6:.0f} million of the embeddings in 16")
        said.append(f"together {(linear + 2 * embeddings) / 1e6:.0f} MB")
        said.append(f"{adapter / 1e6:.0f} million × 16 bytes, {16 * adapter / 1e6:.0f} MB")
    assert [words for words in said if words not in text] == []


# Loading


def test_eight_bits_change_label_probabilities_little(small_qwen, small_cola):
    """With weights so wide log p is about -20 nats; 8-bit rounding moved it by 0.09 on average; allowed is 0.2."""
    table, settings = corpus.read_file(small_cola / "in_domain_dev.tsv"), load_study("paper").profile
    tokenizer = models.load_tokenizer(small_qwen)
    exact, rounded = (
        predict(
            models.load_base(small_qwen, how), tokenizer, settings.prompt, table, settings.evaluation.batch_size, seed=0
        )
        for how in (PLAIN, EIGHT_BIT)
    )
    for column in ("logp_acceptable", "logp_unacceptable"):
        difference = np.abs(exact[column] - rounded[column])
        assert 0 < difference.mean() < 0.2
        assert difference.max() < 0.6


def test_only_linear_layers_are_held_in_eight_bits(small_qwen):
    kinds = {name: weight.dtype for name, weight in models.load_base(small_qwen, EIGHT_BIT).named_parameters()}
    assert {kinds[name] for name in kinds if "_proj" in name} == {torch.int8}
    assert {kinds[name] for name in kinds if "_proj" not in name} == {torch.float32}


def test_evaluation_does_not_depend_on_the_batch_size(small_qwen, small_cola):
    table, settings = corpus.read_file(small_cola / "in_domain_dev.tsv"), load_study("paper").profile
    tokenizer, model = models.load_tokenizer(small_qwen), models.load_base(small_qwen, PLAIN)
    one, many = (predict(model, tokenizer, settings.prompt, table, size, seed=0) for size in (7, 24))
    for column in ("logp_acceptable", "logp_unacceptable"):
        np.testing.assert_allclose(one[column], many[column], atol=2e-5)
    assert one["greedy"].equals(many["greedy"])


# Stages


def test_loss_is_on_the_answer_and_its_end_token_only(stages):
    stage = stages["sft"][0]
    with kept_in_float32(stage.policy):
        batch = next(iter(trainer_of(stage).get_train_dataloader()))
    question = prompts.chat_ids(stage.tokenizer, [prompts.prompt_messages(stage.settings.prompt, "X")])[0][-9:]
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        taught = labels != -100
        first = int(taught.nonzero()[0])
        assert stage.tokenizer.decode(labels[taught]) in ("acceptable<|im_end|>", "unacceptable<|im_end|>")
        assert ids[first - 9 : first].tolist() == question  # end of turn, assistant, no thinking


def test_sft_teaches_the_format(stages):
    _, _, outcome, folder = stages["sft"]
    first, last = outcome.trajectory.iloc[0], outcome.trajectory.iloc[-1]
    assert first["label_mass"] < 0.01
    assert last["label_mass"] > 0.3
    assert last["n"] == 12  # of the 24 sentences, along the way; the final metrics are on all
    metrics = folders.read_json(folder / folders.METRICS)
    assert metrics["evaluation"]["dev"]["n"] == 24
    assert metrics["provenance"]["model"]["id"] == "qwen3"
    json.dumps(metrics, allow_nan=False)


def test_rl_starts_at_the_policy_that_sft_left(stages):
    (sft, *_), (_, start, outcome, _) = stages["sft"], stages["sft-rl"]
    end = adapter(sft.policy)
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert outcome.trajectory["kl_to_parent"].iloc[0] == pytest.approx(0, abs=1e-6)
    exact = sft.settings.model.quantization == "none"
    assert abs(outcome.log["kl"].iloc[0]) < (1e-6 if exact else 1e-3)


def test_the_reference_stays_where_rl_started(stages):
    stage, start, _, _ = stages["sft-rl"]
    reference, end = adapter(stage.policy, "ref"), adapter(stage.policy)
    for name, weight in start.items():
        assert torch.equal(reference[name.replace(".default.", ".ref.")], weight)
    assert any(not torch.equal(end[name], weight) for name, weight in start.items())


def test_the_adapter_is_trained_and_kept_in_float32(stages):
    for stage, *_ in stages.values():
        assert {weight.dtype for weight in adapter(stage.policy).values()} == {torch.float32}
        trained = {name for name, weight in stage.policy.named_parameters() if weight.requires_grad}
        assert trained == {name for name in adapter(stage.policy) if name in trained}


def test_a_saved_adapter_gives_the_same_probabilities(stages):
    stage, _, _, folder = stages["sft-rl"]
    again = models.start_policy(stage.base, folder / folders.POLICY, stage.settings.model, stage.settings.adaptation, 5)
    for name, weight in adapter(again).items():
        assert torch.equal(weight, adapter(stage.policy)[name])
    table = corpus.fixed_subset(stage.corpus, "dev", None)
    fresh = predict(again, stage.tokenizer, stage.settings.prompt, table, stage.settings.evaluation.batch_size, seed=0)
    written = pd.read_parquet(folder / folders.answers_file("dev"))
    pd.testing.assert_series_equal(fresh["logp_acceptable"], written["logp_acceptable"])
    assert fresh["sampled"].equals(written["sampled"])
