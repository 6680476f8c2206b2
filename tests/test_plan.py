"""The plan: what can be run of any profile, and what a user's settings make of its runs."""

import re

import pytest

from nondecoupling.study.plan import has_two_answers, one_per_beta, starts, summaries, three_betas
from nondecoupling.study.study import PROFILES, changed_settings, load_study, parse_overrides

NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml") if path.stem != "four")


@pytest.fixture(params=[[], ["data"], ["model"], ["data", "model"]], ids=" and ".join)
def folders_given(request, tmp_path):
    """What a user gives of DATA= and MODEL=."""
    return dict.fromkeys(request.param, str(tmp_path))


@pytest.mark.parametrize("profile", NAMES)
def test_every_run_comes_after_its_parents_under_a_name_of_its_own(profile, folders_given):
    study = load_study(profile, **folders_given)
    names = [run.name for run in study.runs]
    assert len(set(names)) == len(names)
    for place, run in enumerate(study.runs):
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+(\.[0-9]+)?)*", run.name)
        assert {run.parent, run.proxy} - {None} <= set(names[:place])
        assert study.settings_of(run)


@pytest.mark.parametrize("profile", NAMES)
def test_controls_that_need_the_truth_are_planned_where_it_is_known(profile, folders_given):
    study = load_study(profile, **folders_given)
    clean = [run for run in study.runs if "data.labels" in run.changes]
    assert bool(clean) == (profile in ("nano", "tiny") and "data" not in folders_given)


@pytest.mark.parametrize("profile", NAMES)
def test_what_a_study_makes_itself_is_drawn_by_every_seed_and_what_is_there_is_there_once(profile, folders_given):
    study = load_study(profile, **folders_given)
    real = profile in ("laptop", "paper") or "data" in folders_given
    published = profile in ("laptop", "paper") or "model" in folders_given
    once = ["data"] * real + ["base"] * (real and published)  # each seed's sentences measure a published model anew
    assert [run.name for run in study.runs if run.once] == once


def test_the_runs_of_the_plan():
    """A control that comes or goes does so on purpose."""
    study = load_study("nano")
    betas = [f"sft-rl-b{beta}" for beta in ("5", "2", "1", "0.5", "0.25", "0.1", "0.05")]
    study_groups = ("main", "sweep", "controls", "geometry")
    planned = {group: {run.name for run in study.runs_of(group)} for group in study_groups}
    assert planned["main"] == {"data", "base", "sft", "sft-rl", "rl", "rl-sft"}
    halves = {f"{name}-half" for name in betas} - {"sft-rl-b0.5-half"}
    assert planned["sweep"] == {*betas, *halves, "sft-rl-b1-group"}
    controls = "sft-sft sft-again sft-rl-sft rl-rl sft-rl-random sft-rl-short rl-sft-short sft-wordings sft-rl-format "
    controls += "sft-clean sft-rl-clean reward-model rl-proxy sft-rl-proxy sft-rl-rloo interleaved"
    joint = ["joint-m0.2", "joint-m0.5", "joint-m0.8"]
    assert planned["controls"] == {*controls.split(), *joint}
    starts = [f"sft-{share}" for share in (10, 25, 50)]
    between = {f"{start}-rl-b{beta:g}" for start in starts for beta in (1, 0.5, 0.25)}
    measured = {f"gradients-{name}" for name in (*planned["main"] - {"data"}, *starts)}
    shared = {"sft-rl-b1-half", "sft-rl-b0.25-half"}
    assert planned["geometry"] == {*starts, *between, *measured, *shared, "rl-b1", "rl-b0.25"}
    along = {run.name for run in study.runs if run.curve}
    proxies = {"reward-model", "rl-proxy", "sft-rl-proxy"}
    assert along == planned["main"] | proxies | {*joint, "interleaved"}


def test_runs_that_go_on_are_whole_stages_of_their_own():
    """A second stage of SFT, after SFT and after RL: both are `sft` but for where they start."""
    study = load_study("nano")
    for name, parent in (("sft-again", "sft"), ("sft-rl-sft", "sft-rl")):
        run = study.run(name)
        assert (run.stage, run.parent, run.changes) == ("sft", parent, {})


def test_where_steps_are_dear_each_other_beta_is_run_once():
    study = load_study("laptop")
    swept = study.runs_of("sweep")
    assert [run.name for run in swept] == ["sft-rl-b1", "sft-rl-b0.25"]
    assert {study.settings_of(run).rl.steps for run in swept} == {study.profile.rl.steps}
    assert one_per_beta(study.runs) == swept
    nano = [run.name for run in one_per_beta(load_study("nano").runs)]
    assert nano == [f"sft-rl-b{beta}" for beta in ("5", "2", "1", "0.5", "0.25", "0.1", "0.05")]


@pytest.mark.parametrize("settings", ["", "rl.beta=0.3", "rl.beta=7", "sweep.betas=[]"])
def test_rl_begins_at_every_start_with_the_neighbours_of_its_own_beta(settings):
    study = load_study("nano", overrides=parse_overrides(settings))
    own, betas = study.profile.rl.beta, three_betas(study.profile)
    assert own in betas
    assert all(beta == own or beta in study.profile.sweep.betas for beta in betas)
    for start, runs in starts(study.profile).items():
        assert list(runs) == betas or set(runs) == set(betas)
        for beta, name in runs.items():
            run, settings = study.run(name), study.settings_of(study.run(name))
            assert (run.parent, run.stage) == (start, "rl")
            assert (settings.rl.beta, settings.rl.steps) == (beta, study.profile.rl.steps)
            assert run in study.runs_of("main", "geometry")


def test_geometry_of_a_published_model_trains_nothing():
    assert {run.stage for run in load_study("laptop").runs_of("geometry")} == {"gradients"}


def test_a_published_model_is_also_paid_for_what_it_says_in_sentences():
    study = load_study("laptop")
    assert study.settings_of(study.run("rl-robust")).rl.reward == "robust"
    assert "rl-robust" not in [run.name for run in load_study("nano").runs]


@pytest.mark.parametrize("profile", NAMES)
@pytest.mark.parametrize("settings", ["", "rl.beta=1 sweep.betas=[1.0,0.5,0.25]", "rl.normalisation=group"])
def test_a_run_and_its_half_differ_in_their_number_of_steps_alone(profile, settings):
    study = load_study(profile, overrides=parse_overrides(settings))
    for run in study.runs:
        if run.half:
            half, whole = (study.settings_of(study.run(name)) for name in (run.half, run.name))
            assert half.rl.steps * 2 == whole.rl.steps
            assert set(changed_settings(half, whole)) - {"evaluation.points"} == {"rl.steps"}
            assert study.run(run.half).parent == run.parent


def test_chosen_steps_reach_controls_and_sweep():
    study = load_study("nano", overrides=parse_overrides("rl.steps=100 sft.steps=50 joint.steps=30"))
    of = {run.name: study.settings_of(run) for run in study.runs}
    assert of["sft-sft"].sft.steps == of["sft-rl-random"].rl.steps == of["sft-rl-b0.25-half"].rl.steps == 100
    assert of["sft-rl-b0.5"].rl.steps == of["sft-rl-b0.05"].rl.steps == 200
    assert of["sft-again"].sft.steps == of["sft-rl-sft"].sft.steps == 50
    assert of["rl-sft-short"].sft.steps == 5
    assert of["sft-rl-short"].rl.steps == 25
    assert of["joint-m0.2"].joint.steps == 30
    assert of["interleaved"].joint.steps == 60


def test_chosen_rates_and_prices_reach_the_controls_that_change_them():
    study = load_study("nano", overrides=parse_overrides("rl.beta=2 sft.learning_rate=0.01 rl.steps=1 sft.steps=3"))
    of = {run.name: study.settings_of(run) for run in study.runs}
    assert (of["sft-rl-random"].rl.reward, of["sft-rl-random"].rl.beta) == ("random", 0.6)
    assert of["rl-sft-short"].sft.learning_rate == 0.0025
    assert of["rl-sft-short"].sft.steps == of["sft-rl-short"].rl.steps == 1  # none has no step at all
    assert of["sft-rl-short"].rl.beta == of["sft-rl"].rl.beta == 2


@pytest.mark.parametrize(("settings", "points"), [("evaluation.points=9", {9}), ("", {2, 5})])
def test_a_chosen_number_of_points_reaches_every_run(settings, points):
    study = load_study("nano", overrides=parse_overrides(settings))
    assert {study.settings_of(run).evaluation.points for run in study.runs} == points
    assert study.settings_of(study.run("sft")).evaluation.points == max(points)


def test_a_policy_goes_back_to_the_base_that_it_was_trained_from():
    study = load_study("nano")
    assert {study.base_of(run).name for run in study.runs[1:]} == {"base"}


def test_with_more_than_two_answers_there_are_both_experiments_and_their_own_chapter():
    four, nano = load_study("four"), load_study("nano")
    assert [run.name for run in four.runs] == [run.name for run in nano.runs_of("main")]
    assert all(four.settings_of(run) for run in four.runs)
    assert set(summaries(four.profile)) == {"labels", "claims"}
    assert set(summaries(nano.profile)) == {"theory", "controls", "geometry", "claims"}
    assert (has_two_answers(four.profile), has_two_answers(nano.profile)) == (False, True)
