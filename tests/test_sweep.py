"""The sweep of beta: which runs belong together, what each moved, and when training counts as settled."""

import math

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models
from transformers import Qwen3Config, Qwen3ForCausalLM

from nondecoupling.analysis import sweep, theory
from nondecoupling.study.contracts import SweepEntry
from nondecoupling.study.study import PROFILES, changed_settings, load_study, parse_overrides
from tables import SEEDS, is_a, policy, results_of

STUDY = load_study("nano")
LABELS = [1, 0, 1, 1]
START = np.array([2.0, -1.0, 0.5, -0.2])
RL = [run for run in STUDY.runs_of("sweep") if run.stage == "rl"]

# The plan

SETTINGS = [
    "",
    "rl.steps=100",
    "rl.beta=1 sweep.betas=[2.0,1.0,0.25]",
    "rl.normalisation=group",
    "rl.answers_per_prompt=4 rl.prompts_per_step=8 rl.learning_rate=1.0",
    "adaptation.method=full model.quantization=none",
]
CASES = [(path.stem, settings) for path in sorted(PROFILES.glob("*.yaml")) for settings in SETTINGS]


@pytest.mark.parametrize(("profile", "settings"), CASES)
def test_every_beta_is_run_for_some_steps_and_for_half_of_them(profile, settings):
    study = load_study(profile, overrides=parse_overrides(settings))
    plain = [run for run in study.runs_of("sweep") if run.stage == "rl" and not run.instead]
    whole = [run for run in plain if run.half]
    assert [run.changes["rl.beta"] for run in whole] == study.profile.sweep.betas
    assert {run.half for run in whole} - {"sft-rl"} == {run.name for run in plain} - {run.name for run in whole}
    for run in whole:
        ours, half = study.settings_of(run), study.settings_of(study.run(run.half))
        assert ours.rl.steps == 2 * half.rl.steps == 2 * study.profile.rl.steps
        assert set(changed_settings(half, ours)) - {"evaluation.points"} == {"rl.steps"}
        assert run.parent == study.run(run.half).parent == "sft"


WORDS = {
    "rl.answers_per_prompt": "{} answers",
    "rl.prompts_per_step": "{} prompts",
    "rl.learning_rate": "learning rate {:g}",
    "rl.normalisation": "divided",
    "rl.algorithm": "{}",
    "adaptation.method": "all weights",
}


@pytest.mark.parametrize(("profile", "settings"), [*CASES, ("nano", "rl.algorithm=rloo")])
def test_what_a_run_is_said_to_change_is_what_it_changes(profile, settings):
    study = load_study(profile, overrides=parse_overrides(settings))
    for run in [run for run in study.runs_of("sweep") if run.stage == "rl"]:
        changes = changed_settings(study.profile, study.settings_of(run))
        words = {WORDS[key].format(changes[key]) for key in set(changes) - {"rl.beta", "rl.steps", "evaluation.points"}}
        assert set(filter(None, run.instead.split(", "))) == words
        assert study.run(run.parent).changes.items() <= changes.items()  # it goes on as its start was trained


def test_each_beta_is_given_once():
    with pytest.raises(ValueError, match="betas must differ"):
        load_study("nano", overrides={"sweep.betas": [0.5, 1.0, 0.5]})


# One run


def swept(run, log_odds):
    """One seed of ``run``, which ends at ``log_odds``, and the SFT policy that it starts from."""
    return results_of(STUDY, [policy("sft", START, LABELS, [0]), policy(run, log_odds, LABELS, [0])], seeds=[0])


def test_rl_that_is_ideal_by_its_own_belief_shows_no_gap():
    beta = 0.25
    results = swept("sft-rl-b0.25", theory.self_tilted_log_odds(START, beta))
    row = sweep.confront(results, STUDY.run("sft-rl-b0.25"), 0)
    by_hand = [math.log1p(math.exp(-x if label else x)) for x, label in zip(START, LABELS, strict=True)]
    ideal = START + 2 * np.tanh(START / 2) / beta
    after = [math.log1p(math.exp(-x if label else x)) for x, label in zip(ideal, LABELS, strict=True)]
    assert row["loss"] == pytest.approx(np.mean(after) - np.mean(by_hand))
    assert row["loss"] == pytest.approx(row["loss, own belief"])
    assert row["reward"] == pytest.approx(row["reward, own belief"])
    assert row["loss, perfect learner"] == pytest.approx(theory.rl_loss(0.9, beta) - theory.calibrated_loss(0.9))
    assert row["reward, perfect learner"] == pytest.approx(theory.rl_reward(0.9, beta) - theory.calibrated_reward(0.9))
    assert row["log-odds asked"] == pytest.approx(row["log-odds reached"]) == pytest.approx(np.abs(ideal).mean())
    assert row["objective"] == pytest.approx(1.0)


def test_rl_that_did_nothing_has_all_to_gain():
    row = sweep.confront(swept("sft-rl-b1", START), STUDY.run("sft-rl-b1"), 0)
    assert (row["loss"], row["reward"], row["objective"]) == (0, 0, 0)
    assert row["log-odds reached"] == pytest.approx(np.abs(START).mean())
    assert row["log-odds asked"] == pytest.approx(np.abs(START + 2 * np.tanh(START / 2)).mean())
    p = 1 / (1 + np.exp(-START))
    assert row["silent groups"] == pytest.approx(np.mean(p**8 + (1 - p) ** 8))


def test_groups_divided_by_their_deviation_have_their_own_resting_place():
    plain, divided = (STUDY.settings_of(STUDY.run(name)).rl for name in ("sft-rl-b1", "sft-rl-b1-group"))
    assert sweep.at_rest(START, 0.9, plain) == pytest.approx(START + 1.6)
    expected = theory.grpo_log_odds(START, 0.9, 1.0, 8, normalised=True)
    assert sweep.at_rest(START, 0.9, divided) == pytest.approx(expected)


# The sweep as a whole


def test_the_sweep_is_read_with_halves_from_elsewhere_and_without_sft():
    names = ["sft", "sft-all", *(run.name for run in RL)]
    results = results_of(STUDY, [policy(name, START, LABELS, [3]) for name in [*names, "sft-rl"]], seeds=[3])
    table = sweep.confront_sweep(results)
    assert table["run"].tolist() == [*names[2:], "sft-rl"]
    assert set(table["seed"]) == {3}


def test_where_the_sweep_is_missing_or_incomplete_there_is_none():
    some = [policy(name, START, LABELS) for name in ("sft", "sft-rl", "sft-rl-b1")]
    assert sweep.confront_sweep(results_of(STUDY, some)) is None
    without = load_study("nano", overrides={"sweep.betas": []})
    assert sweep.confront_sweep(results_of(without, some)) is None


def table_of(rise, half, predicted=0.2):
    """`confront_sweep` in which only sft-rl-b1 and its half matter; their rises of the loss per seed."""
    rows = []
    for run in [*RL, STUDY.run("sft-rl")]:
        settings = STUDY.settings_of(run).rl
        losses = {"sft-rl-b1": rise, "sft-rl-b1-half": half}.get(run.name, [0.1] * len(rise))
        for seed, loss in zip(SEEDS, losses, strict=False):
            row = {"run": run.name, "seed": seed, "beta": settings.beta, "steps": settings.steps}
            row |= {"instead": run.instead, "loss": loss, "loss, own belief": predicted}
            row |= {"reward": 0.1, "reward, own belief": 0.1, "log-odds asked": 4.0, "log-odds reached": 3.0}
            rows.append(row | {"silent groups": 0.5, "objective": 0.9})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("rise", "half", "predicted", "settled"),
    [
        ([0.2, 0.2, 0.2], [0.19, 0.19, 0.19], 0.2, True),  # 0.01 of 0.05
        ([0.2, 0.2, 0.2], [0.14, 0.14, 0.14], 0.2, False),
        ([0.2, 0.2, 0.2], [0.26, 0.26, 0.26], 0.2, False),  # falling is no less a movement
        ([0.2, 0.2, 0.2], [0.3, 0.2, 0.1], 0.2, False),  # no movement on average, but the interval is too wide
        ([0.2, 0.2, 0.2], [0.14, 0.14, 0.14], 2.0, False),  # a far prediction does not excuse a movement
        ([0.2, 0.2, 0.2], [0.18, 0.18, 0.18], 0.02, False),  # nor does a far rise
        ([0.02, 0.02, 0.02], [0.011, 0.011, 0.011], 0.02, True),  # within 0.01
        ([0.2], [0.2], 0.2, None),
    ],
)
def test_a_run_has_settled_if_half_of_its_steps_end_at_the_same_place(rise, half, predicted, settled):
    summary = sweep.summarise_sweep(results_of(STUDY), table_of(rise, half, predicted))
    assert is_a(list[SweepEntry], summary)
    entries = {entry["run"]: entry for entry in summary}
    entry = entries["sft-rl-b1"]
    assert entry["settled"] is settled
    assert entry["doubling"]["mean"] == pytest.approx(np.mean(rise) - np.mean(half))
    assert (entry["half"], entries["sft-rl-b1-half"]["is_half"]) == ("sft-rl-b1-half", True)
    assert entry["change_of_loss"]["perfect_learner"] is None
    assert entry["change_of_loss"]["gap_to_own_belief"]["mean"] == pytest.approx(np.mean(rise) - predicted)
    # the half of sft-rl-b0.5 is a run of the paper's experiments, which has no entry of its own
    assert entries["sft-rl-b0.5"]["doubling"]["mean"] == 0
    assert "sft-rl" not in entries
    assert (entries["sft-rl-b1-group"]["doubling"], entries["sft-rl-b1-group"]["settled"]) == (None, None)


def test_effects_are_differences_from_the_plain_run_of_the_same_beta_and_steps():
    table = table_of([0.2] * 3, [0.2] * 3).iloc[::-1]  # plain runs last
    table.loc[table["run"] == "sft-rl-b0.25-32answers", ["loss", "log-odds reached"]] = [0.25, 5.0]
    effects = sweep.effects(table)
    assert set(effects.index) == {
        (f"{run.changes['rl.beta']:g}", run.changes["rl.steps"], run.instead) for run in RL if run.instead
    }
    assert effects.loc[("0.25", 64, "32 answers"), "loss"] == "+0.150 [+0.150, +0.150]"
    assert effects.loc[("0.25", 64, "32 answers"), "log-odds reached"] == "+2.000 [+2.000, +2.000]"
    assert effects.loc[("0.25", 64, "all weights"), "loss"] == "+0.000 [+0.000, +0.000]"
    assert effects.loc[("1", 128, "divided"), "loss"] == "-0.100 [-0.100, -0.100]"
    assert sweep.effects(table[table["instead"] == ""]).empty


# What a model's output layer allows


def test_no_hidden_state_exceeds_the_ceiling_of_the_output_layer_and_one_reaches_it(tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    config = Qwen3Config(vocab_size=3, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, **shape)
    model = Qwen3ForCausalLM(config)
    model.model.norm.weight.data.uniform_(0.5, 2)
    model.save_pretrained(tmp_path)
    Tokenizer(models.WordLevel({"no": 0, "yes": 1, "?": 2}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    ceiling = sweep.log_odds_ceiling(tmp_path, "yes", "no")

    def log_odds(state):
        logits = model.lm_head(model.model.norm(state))
        return (logits[..., 1] - logits[..., 0]).detach()

    direction = model.model.norm.weight.data * (model.lm_head.weight.data[1] - model.lm_head.weight.data[0])
    assert float(log_odds(1e3 * direction)) == pytest.approx(ceiling, rel=1e-4)
    random = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    assert float(log_odds(model.lm_head.weight.new_tensor(random)).abs().max()) < ceiling


def test_answers_of_several_tokens_have_no_ceiling_of_one_token(tmp_path):
    pair = Tokenizer(models.BPE({"y": 0, "n": 1}, []))
    pair.save(str(tmp_path / "tokenizer.json"))
    assert math.isnan(sweep.log_odds_ceiling(tmp_path, "y", "ny"))
