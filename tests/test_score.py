"""`make score`: lm-evaluation-harness and this project agree on a policy, and would not if either were wrong."""

import numpy as np
import pytest

from nondecoupling.study import folders
from nondecoupling.study.plan import STATES
from nondecoupling.task import corpus
from nondecoupling.training import evaluation
from nondecoupling.workflow import score

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: .[score]")


@pytest.fixture(scope="module")
def dev(tiny_results, built_base):
    with pytest.MonkeyPatch.context() as patch:
        from conftest import tiny

        patch.setenv("NONDECOUPLING_RESULTS", str(tiny_results))
        table = corpus.load_checked_corpus(tiny(), 0)
    return corpus.fixed_subset(table, "dev", None).reset_index(drop=True)


@pytest.mark.parametrize("name", ["base", "sft"])
def test_the_harness_finds_the_same_digits(tiny_sft, tiny_study, dev, name):
    root = folders.study_folder(tiny_study)
    row = score.score(tiny_study, name, 0, root, dev)
    assert row["harness_accuracy"] == row["accuracy"]
    assert row["harness_mcc"] == pytest.approx(row["mcc"], abs=1e-12)
    assert row["difference"] < 1e-4
    measured = folders.read_json(folders.run_folder(root, tiny_study.run(name), 0) / folders.METRICS)
    for metric in ("accuracy", "mcc"):
        assert row[metric] == pytest.approx(measured["evaluation"]["dev"][metric], abs=1e-12)
    assert row["n"] == measured["evaluation"]["dev"]["n"] == len(dev)
    assert row["offset"] < 0  # a question ends with two line breaks here, which are not certain


def test_a_policy_that_is_not_the_runs_is_found_out(tiny_sft, tiny_study, dev, monkeypatch):
    """Ours are those of the base, the harness is given what SFT made of it."""
    predict, start = evaluation.predict, score.models.load_base

    def of_the_base(policy, *known):
        base = start(tiny_sft.stage.base, tiny_study.profile.model)
        return predict(base.eval(), *known)

    monkeypatch.setattr(score, "predict", of_the_base)
    assert score.score(tiny_study, "sft", 0, folders.study_folder(tiny_study), dev)["difference"] > 0.01


def test_white_space_is_what_the_harness_moves(tiny_sft, dev):
    policy, tokenizer = tiny_sft.stage.policy, tiny_sft.stage.tokenizer
    chats = [[{"role": "user", "content": sentence}] for sentence in dev["sentence"][:3]]
    questions = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert all(question.endswith("</think>\n\n") for question in questions)
    found = score.white_space_log_probability(policy.eval(), tokenizer, questions, 2)
    assert found.shape == (3,)
    assert (found < 0).all()
    bare = [question.rstrip() for question in questions]
    assert score.white_space_log_probability(policy, tokenizer, bare, 2).tolist() == [0, 0, 0]
    assert np.isfinite(found).all()


def test_what_is_not_finished_is_named_before_anything_is_loaded(tiny_study, monkeypatch):
    monkeypatch.setattr(score, "score", lambda *_: pytest.fail("scored"))
    with pytest.raises(FileNotFoundError, match="make score"):
        score.write_scores(tiny_study, [7])


def test_it_writes_a_row_per_state_and_seed(tiny_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score.folders, "require_complete", lambda *_: None)
    monkeypatch.setattr(score.folders, "study_folder", lambda _: tmp_path)
    monkeypatch.setattr(score, "load_checked_corpus", lambda *_: corpus.pd.DataFrame({"split": ["dev"]}))

    def row(study, name, seed, root, table):
        numbers = dict.fromkeys(("accuracy", "harness_accuracy", "mcc", "harness_mcc", "offset", "difference"), 0.5)
        return {"run": name, "seed": seed, "n": len(table), **numbers}

    monkeypatch.setattr(score, "score", row)
    score.write_scores(tiny_study, [0, 1])
    written = folders.read_json(tmp_path / "score.json")
    assert [(entry["run"], entry["seed"]) for entry in written] == [(name, seed) for seed in (0, 1) for name in STATES]
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(STATES) + 1
