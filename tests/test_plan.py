"""The plan: what can be run of any profile, and what a user's settings make of its runs."""

import re

import pytest

from nondecoupling.study.study import PROFILES, changed_settings, load_study, parse_overrides

NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))


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
def test_controls_that_need_the_truth_or_an_embedded_base_are_planned_where_there_is_one(profile, folders_given):
    study = load_study(profile, **folders_given)
    clean = [run for run in study.runs if "data.labels" in run.changes]
    weak = [run for run in study.runs if run.stage == "base" and run.name != "base"]
    assert bool(clean) == (profile in ("nano", "tiny") and "data" not in folders_given)
    assert bool(weak) == (profile in ("nano", "tiny") and "model" not in folders_given)


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
    assert of["rl-sft-short"].sft.steps == 5
    assert of["joint-m0.2"].joint.steps == 30
    assert of["interleaved"].joint.steps == 60


@pytest.mark.parametrize(("settings", "points"), [("evaluation.points=9", {9}), ("", {2, 5})])
def test_a_chosen_number_of_points_reaches_every_run(settings, points):
    study = load_study("nano", overrides=parse_overrides(settings))
    assert {study.settings_of(run).evaluation.points for run in study.runs} == points
    assert study.settings_of(study.run("sft")).evaluation.points == max(points)


def test_a_policy_goes_back_to_the_base_that_it_was_trained_from():
    study = load_study("nano")
    for run in study.runs_of("main", "sweep", "controls")[1:]:
        assert study.base_of(run).name == ("base-weak" if "weak" in run.name else "base")
