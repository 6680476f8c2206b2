"""Profiles and studies: valid ones load, and every fault is named by its key and the nearest valid name."""

import itertools

import pytest
import yaml
from pydantic import ValidationError

from nondecoupling.study import study
from nondecoupling.study.study import load_study, parse_overrides, parse_seeds, with_overrides

NAMES = sorted(path.stem for path in study.PROFILES.glob("*.yaml"))


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Load the nano profile after its tree, or its text, has been edited."""
    text = (study.PROFILES / "nano.yaml").read_text(encoding="utf-8")
    monkeypatch.setattr(study, "PROFILES", tmp_path)

    def load(change=None, replace=("", "")):
        if change:
            tree = yaml.safe_load(text)
            change(tree)
            edited = yaml.safe_dump(tree)
        else:
            assert replace[0] in text
            edited = text.replace(*replace)
        (tmp_path / "nano.yaml").write_text(edited, encoding="utf-8")
        return load_study("nano")

    return load


def put(*keys, value):
    """An edit of a profile's tree: set ``keys`` to ``value``."""

    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


# Valid profiles


def test_the_embedded_default_is_there():
    assert "nano" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_valid_and_holds_both_experiments(name):
    loaded = load_study(name)
    assert loaded.name == loaded.profile.name == name
    assert {("sft", "base"), ("sft-rl", "sft"), ("rl", "base"), ("rl-sft", "rl")} <= {
        (run.name, run.parent) for run in loaded.runs
    }
    assert parse_seeds(loaded.profile.seeds)


def test_a_loaded_profile_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_study("nano").profile.rl.beta = 1.0


# Faults in the file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("rl", "betta", value=0.5), ["'rl.betta'", "'beta'"]),
        (put("sfft", value={}), ["'sfft'", "'sft'"]),
        (put("pretrain", "layer", value=2), ["'pretrain.layer'", "'layers'"]),  # an optional section
        (put("runs", value=[]), ["unknown setting 'runs'"]),  # the plan is code
        (put("sweep", "betas", value=[1.0, 0.0]), ["'sweep.betas.1'", "0.0", "greater than 0"]),
        (put("rl", "steps", value="ten"), ["'rl.steps'", "'ten'", "integer"]),
        (put("sft", "steps", value=2.5), ["'sft.steps'", "2.5", "integer"]),
        (put("sft", "steps", value=True), ["'sft.steps'", "True", "integer"]),
        (put("model", "folder", value=3), ["'model.folder'", "3", "string"]),
        (put("seeds", value=5), ["'seeds'", "5", "string"]),
        (put("data", "disagreement", value=0.5), ["'data.disagreement'", "0.5", "less than"]),
        (put("data", "disagreement", value=-0.1), ["'data.disagreement'", "-0.1", "at least 0"]),
        (put("data", "disagreement", value="some"), ["'data.disagreement'", "'some'", "number"]),
        (put("data", "disagreement", "case", value=0.5), ["'data.disagreement'", "0.5", "less than"]),
        (put("data", "disagreement", "case", value=None), ["'data.disagreement'", "None", "number"]),
        (put("data", "disagreement", value=None), ["generated corpus needs", "'disagreement'"]),
        (put("pretrain", "text_share", value=0.0), ["'pretrain'", "text_share (0.0)", "both"]),
        (put("pretrain", "text_share", value=1.0), ["'pretrain'", "text_share (1.0)", "both"]),
        (put("pretrain", "settled_at", value=0.5), ["'pretrain'", "sure_until must come before settled_at"]),
        (put("sft", "steps", value=10**19), ["'sft.steps'", "less than or equal to 10000000"]),
        (put("prompt", "max_new_tokens", value=1), ["'prompt.max_new_tokens'", "1", "greater than or equal to 2"]),
        (put("pretrain", "head_size", value=7), ["'pretrain'", "head_size (7)", "divide hidden_size (64)"]),
        (put("pretrain", "hidden_size", value=1), ["'pretrain'", "head_size (32)", "divide hidden_size (1)"]),
        (put("pretrain", "vocabulary", value=10), ["'pretrain'", "vocabulary (10)", "at least 300"]),
        (put("data", "train_size", value=31), ["data.train_size (31)", "32", "in one step"]),
        (put("data", "dev_size", value=1), ["data.dev_size (1)", "at least 20"]),
        (put("rl", "answers_per_prompt", value=1), ["'rl.answers_per_prompt'", "1", "greater than or equal to 2"]),
        (put("rl", "beta", value=-1.0), ["'rl.beta'", "-1", "greater than or equal to 0"]),
        (put("sft", "learning_rate", value=0.0), ["'sft.learning_rate'", "0.0", "greater than 0"]),
        (put("sft", "learning_rate", value=float("nan")), ["'sft.learning_rate'", "nan"]),
        (put("sft", "learning_rate", value=float("inf")), ["'sft.learning_rate'", "inf"]),
        (put("sft", "warmup_share", value=1.5), ["'sft.warmup_share'", "1.5", "less than or equal to 1"]),
        (put("evaluation", "points", value=1), ["'evaluation.points'", "1", "greater than or equal to 2"]),
        (put("rl", "reward", value="lenient"), ["'rl.reward'", "'lenient'", "'strict'", "'robust'"]),
        (put("adaptation", "method", value="qlora"), ["'adaptation.method'", "'qlora'", "'lora'"]),
        (put("prompt", "template", value="Fine?"), ["'prompt.template'", "sentence"]),
        (put("prompt", "acceptable", value=""), ["'prompt.acceptable'"]),
        (put("prompt", "unacceptable", value="Acceptable"), ["prompt", "acceptable"]),  # robust reading ignores case
        (lambda tree: tree["sft"].pop("steps"), ["'sft.steps'", "missing"]),
        (lambda tree: tree.pop("pretrain"), ["no base model", "'pretrain'"]),
    ],
)
def test_a_fault_is_named_by_its_key_in_one_sentence(edit, change, words):
    with pytest.raises(ValueError, match="nano.yaml") as caught:
        edit(change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_number_that_yaml_reads_as_text_is_explained(edit):
    with pytest.raises(ValueError, match=r"'sft.learning_rate' is '3e-3'.*write 1.0e-3"):
        edit(replace=("learning_rate: 3.0e-3", "learning_rate: 3e-3"))


def test_other_text_gets_no_such_hint(edit):
    with pytest.raises(ValueError, match=r"'sft.learning_rate'") as caught:
        edit(replace=("learning_rate: 3.0e-3", "learning_rate: fast"))
    assert "1.0e-3" not in str(caught.value)


# The plan's runs


def test_an_unknown_run_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'nano' has no run 'sft-rll' \(did you mean 'sft-rl'\?\)"):
        load_study("nano").run("sft-rll")


def test_an_unknown_name_near_to_nothing_is_answered_with_all():
    with pytest.raises(ValueError, match=r"there is data, base, sft, sft-rl, rl, rl-sft"):
        load_study("nano").run("zzzz")


def test_changes_of_a_run_concern_that_run_only():
    nano = load_study("nano")
    assert nano.settings_of(nano.run("sft-rl-b2")).rl.beta == 2.0
    assert nano.settings_of(nano.run("rl")).rl.beta == nano.profile.rl.beta == 0.5


def test_the_proxy_cannot_pay_the_main_runs():
    with pytest.raises(ValueError, match=r"rl.reward=proxy needs a reward model.*make controls"):
        load_study("nano", overrides={"rl.reward": "proxy"})


@pytest.mark.parametrize("changes", [{"rl.algorithm": "rloo"}, {"model.quantization": "8bit"}, {"rl.beta": 0.0}])
def test_runs_that_a_setting_makes_impossible_are_not_planned(changes):
    changed = load_study("nano", overrides=changes)
    for run in changed.runs:
        changed.settings_of(run)  # raises where settings contradict each other


# What the user changes


def test_an_unknown_profile_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no profile 'nanno' \(did you mean 'nano'\?\)"):
        load_study("nanno")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rl.betta": 1.0}, ["'rl.betta'", "'rl.beta'"]),
        ({"beta": 1.0}, ["'beta'"]),
        ({"rl": 1.0}, ["'rl'"]),
        ({"runs": []}, ["'runs'"]),
        ({"": 1}, ["''"]),
        ({"rl.beta": "strong"}, ["'rl.beta'", "'strong'"]),
        ({"sft.steps": "10"}, ["'sft.steps'", "'10'"]),
        ({"sft.steps": 0}, ["'sft.steps'", "greater than 0"]),
        ({"sft.schedule": "step"}, ["'sft.schedule'", "'cosine'"]),
        ({"rl.beta": float("nan")}, ["'rl.beta'", "nan"]),
        ({"rl.beta": float("inf")}, ["'rl.beta'", "inf"]),
    ],
)
def test_a_bad_override_is_named(overrides, words):
    with pytest.raises(ValueError, match="'") as caught:
        load_study("nano", overrides=overrides)
    for word in words:
        assert word in str(caught.value)


def test_overrides_replace_only_what_they_name():
    plain, changed = load_study("nano").profile, load_study("nano", overrides={"rl.beta": 0.25, "sft.steps": 7}).profile
    assert (changed.rl.beta, changed.sft.steps) == (0.25, 7)
    assert with_overrides(changed, {"rl.beta": plain.rl.beta, "sft.steps": plain.sft.steps}) == plain


@pytest.mark.parametrize("which", ["data", "model"])
def test_folders_must_exist_and_are_kept_as_absolute_paths(which, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{which}.folder: 'mine' is not a folder"):
        load_study("nano", **{which: "mine"})
    (tmp_path / "mine").mkdir()
    assert getattr(load_study("nano", **{which: "mine"}).profile, which).folder == str(tmp_path / "mine")


def test_a_folder_given_as_an_override_is_checked_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data.folder"):
        load_study("nano", overrides={"data.folder": "nowhere"})


# Names of studies: different studies never share a folder


def test_different_changes_have_different_names(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    studies = [
        load_study("nano"),
        load_study("nano", overrides={"rl.beta": 0.25}),
        load_study("nano", overrides={"rl.beta": 0.5001}),
        load_study("nano", overrides={"sft.learning_rate": 1e-5}),
        load_study("nano", overrides={"sft.learning_rate": 1e-4}),
        load_study("nano", overrides={"rl.beta": 0.25, "sft.steps": 7}),
        load_study("nano", data=one),
        load_study("nano", data=two),
        load_study("nano", data=one, model=two),
        load_study("nano", data=one, overrides={"rl.beta": 0.25}),
    ]
    for first, second in itertools.combinations(studies, 2):
        assert first.profile != second.profile
        assert first.name != second.name


def test_data_and_model_of_one_name_are_not_confused(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert load_study("nano", data=str(folder)).name != load_study("nano", model=str(folder)).name


def test_a_study_is_named_by_the_content_of_its_folder_and_not_by_its_place(tmp_path):
    folders = [tmp_path / place / "cola" for place in "abc"]
    for folder, text in zip(folders, ("one", "two", "one"), strict=True):
        folder.mkdir(parents=True)
        (folder / "in_domain_dev.tsv").write_text(text)
    first, second, third = (load_study("nano", data=str(folder)).name for folder in folders)
    assert first != second
    assert first == third


def test_words_that_differ_in_punctuation_only_are_not_confused():
    first, second = (load_study("nano", overrides={"prompt.acceptable": word}) for word in ("yes!", "yes?"))
    assert first.name != second.name


def test_the_order_of_overrides_does_not_matter():
    changes = {"rl.beta": 0.25, "sft.steps": 7}
    assert load_study("nano", overrides=changes) == load_study("nano", overrides=dict(reversed(changes.items())))


@pytest.mark.parametrize("value", ["../../elsewhere", "a/b", "a b", "$HOME", "a:b#c%d"])
def test_names_are_safe_for_file_systems_and_make(value):
    name = load_study("nano", overrides={"prompt.acceptable": value}).name
    assert name.startswith("nano-")
    assert not set(name) & set("/ $:#%\\\"'")


def test_many_overrides_still_make_a_name_that_a_folder_can_have():
    settings = load_study("nano").profile.model_dump()
    overrides = {f"pretrain.{key}": value for key, value in settings["pretrain"].items()}
    assert len(load_study("nano", overrides=overrides).name) <= 240  # 255 bytes on common file systems


# Text on the command line


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-4", [0, 1, 2, 3, 4]),
        ("0,3,7", [0, 3, 7]),
        ("0-2,7", [0, 1, 2, 7]),
        ("5", [5]),
        ("7,3,3", [3, 7]),
        ("2-2", [2]),
        (" 0 , 2 ", [0, 2]),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0-100000000", "0-1000", "5,10-1009"])
def test_more_seeds_than_any_study_has_are_refused_at_once(text):
    with pytest.raises(ValueError, match=f"Seeds '{text}' are more than 1000"):
        parse_seeds(text)
    assert len(parse_seeds("0-999")) == 1000


@pytest.mark.parametrize("text", ["", "a", "4-0", "-1", "0,", "0,,1", "1.5", "0 1", "0-", "0-1-2", "٣", " ", "9" * 20])
def test_bad_seeds_are_shown_with_an_example(text):
    with pytest.raises(ValueError, match="write 0-4 or 0,3,7") as caught:
        parse_seeds(text)
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", {}),
        ("rl.beta=0.25  sft.steps=100", {"rl.beta": 0.25, "sft.steps": 100}),
        ("sft.learning_rate=1e-3", {"sft.learning_rate": 0.001}),
        ("sft.schedule=linear", {"sft.schedule": "linear"}),
        ("prompt.acceptable=a=b", {"prompt.acceptable": "a=b"}),
        ("model.folder=null", {"model.folder": None}),
        ('prompt.acceptable="it is" rl.beta=1', {"prompt.acceptable": "it is", "rl.beta": 1}),
        (r'prompt.template="So?\n\n\"{sentence}\""', {"prompt.template": 'So?\n\n"{sentence}"'}),
        ('evaluation.splits=["dev","train"]', {"evaluation.splits": ["dev", "train"]}),
    ],
)
def test_overrides(text, overrides):
    parsed = parse_overrides(text)
    assert parsed == overrides
    assert {key: type(value) for key, value in parsed.items()} == {key: type(v) for key, v in overrides.items()}


@pytest.mark.parametrize(
    "text", ["rl.beta", "rl.beta=", "sft.steps=3 rl.beta", "rl.beta = 0.25", 'prompt.acceptable="so']
)
def test_bad_overrides_are_shown_with_an_example(text):
    with pytest.raises(ValueError, match="rl.beta=0.25"):
        parse_overrides(text)


def test_a_study_says_what_the_user_chose():
    changed = load_study("nano", overrides={"rl.beta": 0.25})
    assert "rl.beta_0.25" in changed.name  # a reader of results/ can tell
    assert changed.chosen == {"rl.beta"}
    assert study.changed_settings(load_study("nano").profile, changed.profile) == {"rl.beta": 0.25}


@pytest.mark.parametrize("text", ["data.disagreement=0.2", 'data.disagreement={"tense":0,"case":0.2}'])
def test_disagreement_is_one_rate_or_one_for_each_phenomenon(text):
    overrides = parse_overrides(text)
    assert load_study("nano", overrides=overrides).profile.data.disagreement == overrides["data.disagreement"]


def test_one_and_one_point_zero_are_one_study():
    one, same = (load_study("nano", overrides={"rl.beta": value}) for value in (1, 1.0))
    assert one == same


def test_a_setting_that_is_given_twice_is_named():
    with pytest.raises(ValueError, match=r"SET gives 'rl\.beta' twice"):
        parse_overrides("rl.beta=1 sft.steps=3 rl.beta=2")
