"""Other people's models: those that trl can train are trained here, and the others refused with the reason."""

import json
import re
import shutil
import time

import pytest
import torch
from transformers import AutoTokenizer

from conftest import make_base, make_data, results_in
from kinds import KINDS, MAMBA, make_model
from nondecoupling.study import folders
from nondecoupling.study.profile import Model
from nondecoupling.study.results import label_log_probabilities
from nondecoupling.study.study import load_study
from nondecoupling.task import hub, prompts
from nondecoupling.training import models
from nondecoupling.training.evaluation import predict
from nondecoupling.training.stage import prepare_stage, publish_stage
from nondecoupling.workflow import __main__ as cli
from nondecoupling.workflow import executor
from trainers import train

SHORT = {
    "data.train_size": 200,
    "data.dev_size": 20,
    "evaluation.train_size": 10,
    "sft.steps": 8,
    "sft.learning_rate": 1.0e-2,
    "rl.steps": 1,
    "rl.least_rewarded": 0.0,
    "reward_model.steps": 1,
}
PLAIN = Model(folder=None, quantization="none", dtype="float32")
THROUGH_ALL = "GPT-2"  # which also learns a reward and is paid by it: it names no token to fill rows up with


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """A kind, and its stages after SFT and after RL: (stage, outcome), by run."""
    folder = make_model(KINDS[request.param], tmp_path_factory.mktemp("models") / "model")
    study = load_study("tiny", model=str(folder), overrides=SHORT)
    runs = ["sft", "sft-rl", *(["reward-model", "rl-proxy"] if request.param == THROUGH_ALL else [])]
    done = {}
    with results_in(tmp_path_factory.mktemp("results")):
        make_data(study)
        make_base(study)
        for run in runs:
            stage = prepare_stage(study, run, 0, expected=study.run(run).stage)
            done[run] = stage, train(stage)
            publish_stage(*done[run])
    return KINDS[request.param], done


def test_a_kind_goes_through_the_stages(trained):
    kind, done = trained
    _, sft = done["sft"]
    assert sft.trajectory["sft_loss"].iloc[-1] < sft.trajectory["sft_loss"].iloc[0] - 1
    for _, outcome in done.values():
        assert outcome.training["steps"] == len(outcome.log)
        assert outcome.trajectory.notna().all(axis=None)
        if "kl_to_parent" in outcome.trajectory:
            assert outcome.trajectory["kl_to_parent"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert abs(done["sft-rl"][1].log["kl"].iloc[0]) < 1e-6


def test_a_kind_is_asked_and_ends_as_its_template_says(trained):
    kind, done = trained
    stage, _ = done["sft"]
    tokenizer, prompt = stage.tokenizer, stage.settings.prompt
    [asked] = prompts.prompt_ids(tokenizer, prompt, ["The boys slept."])
    text = tokenizer.decode(asked)
    assert text.count("The boys slept.") == 1
    assert "<think>" not in text
    assert tokenizer.eos_token == kind.ends
    time.sleep(0.001)
    assert prompts.prompt_ids(tokenizer, prompt, ["The boys slept."]) == [asked]  # at another time
    for answer in prompts.responses(prompt):
        ids = prompts.response_ids(tokenizer, answer)
        assert ids[-1] == tokenizer.eos_token_id
        assert prompts.answer_texts(tokenizer, [ids]) == [answer]
        assert tokenizer.decode(ids).split() in ([answer + kind.ends], [answer, kind.ends])


def test_what_is_read_in_parts_is_what_is_read_at_once(trained):
    """Probabilities of both answers and the greedy answer, beside the model's own without cache, padding or batch."""
    _, done = trained
    stage, _ = done["sft-rl"]
    policy, tokenizer, prompt = stage.policy.eval(), stage.tokenizer, stage.settings.prompt
    table = stage.corpus.query("split == 'dev'").head(6)
    found = predict(policy, tokenizer, prompt, table, batch_size=4, seed=0)
    for question, logp, greedy in zip(
        prompts.prompt_ids(tokenizer, prompt, table["sentence"]),
        label_log_probabilities(found),
        found["greedy"],
        strict=True,
    ):
        for answer, expected in zip(prompts.responses(prompt), logp, strict=True):
            ids = prompts.response_ids(tokenizer, answer)
            with torch.inference_mode():
                nats = policy(torch.tensor([question + ids])).logits[0].log_softmax(-1)
            place = range(len(question) - 1, len(question) + len(ids) - 1)
            assert sum(nats[at, token] for at, token in zip(place, ids, strict=True)).item() == pytest.approx(
                expected, abs=1e-3
            )
        told = list(question)
        with torch.inference_mode():
            for _ in range(prompt.max_new_tokens):
                told.append(int(policy(torch.tensor([told])).logits[0, -1].argmax()))
                if told[-1] == tokenizer.eos_token_id:
                    break
        assert prompts.answer_texts(tokenizer, [told[len(question) :]]) == [greedy]


def test_nothing_is_dropped_while_a_kind_is_trained(trained):
    _, done = trained
    stage, _ = done["sft"]
    [question] = prompts.prompt_ids(stage.tokenizer, stage.settings.prompt, ["The boys slept."])
    policy = stage.policy.train()
    first, second = (policy(torch.tensor([question])).logits for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, stage.policy.eval()(torch.tensor([question])).logits)


# What is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(KINDS["Qwen 2 base"], tmp_path_factory.mktemp("models") / "plain")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def an_adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')


def of_its_own_kind(folder):
    change(folder / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    (folder / "mine.py").write_text("raise SystemExit('was run')")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_no_model(folder):
    (folder / "config.json").unlink()


def half(folder):
    (folder / "config.json").write_text('{"model_type": ')


def of_a_larger_tokenizer(folder):
    change(folder / "config.json", vocab_size=500)


def with_a_word_added(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(folder / "config.json", vocab_size=len(tokenizer))
    tokenizer.add_tokens(["acceptable to"])
    tokenizer.save_pretrained(folder)


def half_a_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_template, "has no chat template"),
        (an_adapter, "holds an adapter and not a whole model"),
        (of_its_own_kind, "of the kind 'mine', which the installed transformers does not have; code .* is not run"),
        (pickled, "holds no weights in safetensors' format"),
        (of_no_model, "holds no model in Hugging Face's format"),
        (half, r"config\.json is damaged"),
        (of_a_larger_tokenizer, r"has tokens up to number \d+, but the model has embeddings of only 500"),
        (with_a_word_added, r"has tokens up to number (\d+), but the model has embeddings of only \1"),
        (half_a_tokenizer, "tokenizer in .* cannot be loaded: "),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_a_kernel_starts(
    folder, tmp_path, monkeypatch, capsys, damage, words
):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(executor, "run_make", lambda *_, **__: pytest.fail("make was started"))
    damaged = shutil.copytree(folder, tmp_path / "model")
    damage(damaged)
    start = time.perf_counter()
    assert cli.main(["reproduce", "--profile=tiny", f"--model={damaged}"]) == 1
    assert time.perf_counter() - start < 10
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert str(damaged) in said
    assert re.search(words, said), said


def test_a_special_token_that_no_chat_needs_may_be_beyond_the_embeddings(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(place)
    change(place / "config.json", vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(place)
    hub.check_model(place)
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(place)
    with pytest.raises(ValueError, match="has tokens up to number"):
        hub.check_model(place)


def test_a_model_that_keeps_a_state_of_another_kind_is_refused(tmp_path):
    place = make_model(MAMBA, tmp_path / "model")
    with pytest.raises(ValueError, match="of the kind 'mamba', which keeps no keys and values"):
        models.load_base(place, PLAIN)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}", "took more than"),
        ("{{ raise_exception('no chats today') }}", "no chats today"),
        ("{% for message in messages %}", "cannot be asked: "),
    ],
)
def test_a_template_that_writes_nothing_is_refused(folder, tmp_path, monkeypatch, template, words):
    monkeypatch.setattr(models, "TEMPLATE_SECONDS", 1)
    damaged = shutil.copytree(folder, tmp_path / "model")
    (damaged / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=words) as caught:
        models.load_tokenizer(damaged)
    assert str(damaged) in str(caught.value)


def test_a_template_without_an_end_needs_a_token_that_is_one(folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "model")
    (damaged / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    change(damaged / "tokenizer_config.json", eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="says how an answer ends"):
        models.load_tokenizer(damaged)


def test_of_several_templates_the_plain_one_is_used(folder, tmp_path):
    several = shutil.copytree(folder, tmp_path / "model")
    text = (several / "chat_template.jinja").read_text()
    (several / "additional_chat_templates").mkdir()
    (several / "additional_chat_templates" / "tool_use.jinja").write_text("{{ raise_exception('tools') }}")
    assert models.load_tokenizer(several).chat_template == models.load_tokenizer(folder).chat_template == text


def test_a_folder_as_it_was_published_stays_as_it_is(trained):
    """What is made of a template lives in memory alone."""
    kind, done = trained
    base = done["sft"][0].base
    assert (base / "chat_template.jinja").read_text() == kind.template
    assert folders.read_json(base / "tokenizer_config.json")["eos_token"] == kind.named["eos_token"]
