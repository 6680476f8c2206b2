"""The sweep of beta: which runs belong together, what each moved, and when training counts as settled."""

import math

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models
from transformers import Qwen3Config, Qwen3ForCausalLM

from nondecoupling import runs, sweep, theory
from nondecoupling.profile import load_study

STUDY = load_study("nano")
LABELS = [1, 0, 1, 1]
START = np.array([2.0, -1.0, 0.5, -0.2])


def write_run(root, run, seed, log_odds):
    folder = runs.run_folder(root, run, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / runs.METRICS).write_text("{}")
    unacceptable, acceptable = theory.two_label_policy(log_odds).T
    table = pd.DataFrame({"sentence": list("abcd"), "label": LABELS})
    table.assign(logp_acceptable=acceptable, logp_unacceptable=unacceptable).to_parquet(
        folder / runs.predictions_file("dev")
    )


def test_halves_are_found_by_their_settings():
    halves = {run.name: sweep.half_of(STUDY, run) for run in STUDY.runs_of("sweep") if run.stage == "rl"}
    found = {name: half.name for name, half in halves.items() if half}
    betas = ["5", "2", "1", "0.25", "0.1", "0.05"]
    assert found == {f"sft-rl-b{b}": f"sft-rl-b{b}-half" for b in betas} | {"sft-rl-b0.5": "sft-rl"}
    # 32 answers, 128 prompts or other weights make another run, whatever its steps
    assert sweep.half_of(load_study("nano", overrides={"rl.steps": 63}), STUDY.run("sft-rl-b0.5")) is None


def test_what_a_run_varies_is_said_in_words():
    said = {name: sweep.varied(STUDY, STUDY.run(name)) for name in [run.name for run in STUDY.runs_of("sweep")]}
    assert {name: words for name, words in said.items() if words} == {
        "sft-rl-b1-group": "divided",
        "sft-rl-b0.25-32answers": "32 answers",
        "sft-rl-b0.25-128prompts": "128 prompts",
        "sft-all": "all weights",
        "sft-all-rl-b0.25": "all weights",
        "sft-all-rl-b0.25-slow": "all weights, learning rate 0.0005",
    }
    divided = load_study("nano", overrides={"rl.normalisation": "group"})
    assert sweep.varied(divided, divided.run("sft-rl-b1-group")) == ""


def test_rl_that_is_ideal_by_its_own_belief_shows_no_gap(tmp_path):
    beta = 0.25
    write_run(tmp_path, "sft", 0, START)
    write_run(tmp_path, "sft-rl-b0.25", 0, theory.self_tilted_log_odds(START, beta))
    row = sweep.confront(STUDY, tmp_path, STUDY.run("sft-rl-b0.25"), 0)
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


def test_rl_that_did_nothing_has_all_to_gain(tmp_path):
    for run in ("sft", "sft-rl-b1"):
        write_run(tmp_path, run, 0, START)
    row = sweep.confront(STUDY, tmp_path, STUDY.run("sft-rl-b1"), 0)
    assert (row["loss"], row["reward"], row["objective"]) == (0, 0, 0)
    p = 1 / (1 + np.exp(-START))
    assert row["silent groups"] == pytest.approx(np.mean(p**8 + (1 - p) ** 8))


def test_groups_divided_by_their_deviation_have_their_own_resting_place():
    rl = STUDY.for_run("sft-rl-b1-group").rl
    plain = STUDY.for_run("sft-rl-b1").rl
    assert sweep.at_rest(START, 0.9, plain) == pytest.approx(START + 1.6)
    assert sweep.at_rest(START, 0.9, rl) == pytest.approx(theory.grpo_log_odds(START, 0.9, 1.0, 8, normalised=True))


def sweep_rows(rise, half, predicted=0.2):
    """``read_sweep`` of three seeds in which only sft-rl-b1 and its half matter; their rises of the loss per seed."""
    rows = []
    for entry in [run for run in STUDY.runs_of("sweep") if run.stage == "rl"]:
        settings = STUDY.for_run(entry.name).rl
        losses = {"sft-rl-b1": rise, "sft-rl-b1-half": half}.get(entry.name, [0.1] * 3)
        for seed, loss in enumerate(losses):
            row = {"run": entry.name, "seed": seed, "beta": settings.beta, "steps": settings.steps}
            row |= {"varied": sweep.varied(STUDY, entry), "loss": loss, "loss, own belief": predicted}
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
        ([0.02, 0.02, 0.02], [0.011, 0.011, 0.011], 0.02, True),  # within 0.01
        ([0.2], [0.2], 0.2, None),
    ],
)
def test_a_run_has_settled_if_half_of_its_steps_end_at_the_same_place(rise, half, predicted, settled):
    table = sweep_rows(rise, half, predicted)
    table = table[table["seed"] < len(rise)]
    entries = {entry["run"]: entry for entry in sweep.summarise_sweep(STUDY, table)}
    entry = entries["sft-rl-b1"]
    assert entry["settled"] is settled
    assert entry["doubling"]["mean"] == pytest.approx(np.mean(rise) - np.mean(half))
    assert (entry["half"], entries["sft-rl-b1-half"]["is_half"]) == ("sft-rl-b1-half", True)
    # sft-rl, the half of sft-rl-b0.5, is not in this table
    assert (entries["sft-rl-b0.5"]["doubling"], entries["sft-rl-b0.5"]["settled"]) == (None, None)
    assert entries["sft-rl-b1"]["change_of_loss"]["perfect_learner"] is None


def test_the_sweep_is_read_with_halves_from_elsewhere_and_without_sft(tmp_path):
    for run in ["sft", "sft-all", *(run.name for run in STUDY.runs_of("sweep") if run.stage == "rl")]:
        write_run(tmp_path, run, 3, START)
    names = list(sweep.read_sweep(STUDY, tmp_path, [3])["run"])
    assert not {"sft-rl", "sft-all"} & set(names)
    write_run(tmp_path, "sft-rl", 3, START)
    assert sorted(sweep.read_sweep(STUDY, tmp_path, [3])["run"]) == sorted([*names, "sft-rl"])


def test_effects_are_differences_from_the_plain_run_of_the_same_beta_and_steps():
    table = sweep_rows([0.2] * 3, [0.2] * 3)
    table.loc[table["run"] == "sft-rl-b0.25-32answers", ["loss", "log-odds reached"]] = [0.25, 5.0]
    effects = sweep.effects(table)
    assert set(effects.index) == {
        ("1", 128, "divided"),
        ("0.25", 64, "32 answers"),
        ("0.25", 64, "128 prompts"),
        ("0.25", 64, "all weights"),
        ("0.25", 64, "all weights, learning rate 0.0005"),
    }
    assert effects.loc[("0.25", 64, "32 answers"), "loss"] == "+0.150 [+0.150, +0.150]"
    assert effects.loc[("0.25", 64, "32 answers"), "log-odds reached"] == "+2.000 [+2.000, +2.000]"
    assert effects.loc[("0.25", 64, "all weights"), "loss"] == "+0.000 [+0.000, +0.000]"
    assert sweep.effects(table[table["varied"] == ""]).empty


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


def test_intervals_as_text():
    assert sweep.shown(None) == "-"
    assert sweep.shown(sweep.over_seeds([0.5])) == "+0.500"
    assert sweep.shown({"mean": 0.21, "ci95": [-0.1, 0.52]}, ".0%") == "21% [-10%, 52%]"
