"""A study so small that its stages take a second: the same code as a real one, in a folder of its own."""

import os
import shutil

# Before torch is imported: one thread, because thread counts change the order of additions; nothing from the network.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MPLBACKEND": "agg",
}

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from nondecoupling import corpus, grammar, runs
from nondecoupling.profile import Study, load_study, with_overrides

SHARED = runs.REPOSITORY.parent / "shared"

# Every number that decides what is learnt, so that tests do not depend on how the nano profile is tuned.
TINY = {
    "data.train_size": 400,
    "data.dev_size": 60,
    "data.disagreement": 0.1,
    "data.seed": 7,
    "adaptation.method": "lora",
    "adaptation.rank": 16,
    "adaptation.alpha": 32,
    "pretrain.vocabulary": 640,
    "pretrain.hidden_size": 64,
    "pretrain.layers": 2,
    "pretrain.head_size": 32,
    "pretrain.intermediate_size": 192,
    "pretrain.corpus_size": 3000,
    "pretrain.text_share": 0.2,
    "pretrain.text_weight": 0.3,
    "pretrain.batch_size": 32,
    "pretrain.learning_rate": 1.0e-2,  # the first steps are warm-up
    "pretrain.max_steps": 100,
    "pretrain.probe_size": 40,
    "pretrain.probe_every": 70,  # enough to answer in the format, though not to know the answers
    "pretrain.probe_target": 0.0,  # pretraining stops at the first probe
    "pretrain.seed": 0,
    "sft.steps": 4,
    "sft.batch_size": 16,
    "sft.learning_rate": 3.0e-3,
    "sft.warmup_share": 0.05,
    "sft.schedule": "cosine",
    "sft.other_wording_share": 0.0,
    "rl.algorithm": "grpo",
    "rl.steps": 3,
    "rl.prompts_per_step": 4,
    "rl.answers_per_prompt": 4,
    "rl.learning_rate": 2.0e-3,
    "rl.warmup_share": 0.05,
    "rl.schedule": "cosine",
    "rl.beta": 0.5,
    "rl.normalisation": "none",
    "rl.reward": "strict",
    "joint.steps": 4,
    "joint.prompts_per_step": 3,
    "joint.demonstrations_per_step": 6,
    "joint.learning_rate": 3.0e-3,
    "joint.weight": 0.5,
    "joint.phases": 0,
    "reward.steps": 4,
    "reward.pairs_per_step": 8,
    "reward.learning_rate": 3.0e-3,
    "prompt.max_new_tokens": 4,
    "evaluation.points": 2,
    "evaluation.train_size": 40,
    "evaluation.batch_size": 250,
}


class Trained(NamedTuple):
    """A finished stage: what it started from, what training returned, and the published folder."""

    stage: object
    outcome: object
    folder: Path


def tiny(changes: dict | None = None) -> Study:
    """The tiny study; its folder has the same name whatever ``changes`` are."""
    profile = with_overrides(load_study("nano").profile, TINY | (changes or {}))
    return Study(name="tiny", profile=profile)


@contextmanager
def results_in(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NONDECOUPLING_RESULTS", str(folder))
        yield


def make_data(study: Study) -> Path:
    """What notebook 1 does."""
    started, root = runs.now(), runs.study_folder(study)
    partial = runs.open_run(root, "data", seed=0)
    folder = corpus.collect_corpus(study.profile.data, partial)
    summary = corpus.describe_corpus(corpus.load_corpus(folder))
    runs.write_metrics(
        partial,
        study,
        run="data",
        stage="data",
        parent=None,
        seed=None,
        evaluation={split: {"n": int(row.sentences)} for split, row in summary.iterrows()},
        training={},
        provenance=runs.describe_provenance(study, started, data_sha256=runs.file_hashes(folder, "*.tsv")),
    )
    return runs.publish(partial)


def make_base(study: Study) -> Path:
    """What notebook 2 does."""
    from nondecoupling import models, pretrain, training

    started, root, settings = runs.now(), runs.study_folder(study), study.profile
    table = training.load_checked_corpus(study, root)
    partial = runs.open_run(root, "base", seed=0)
    base = training.base_folder(study, root) if settings.model.folder else partial / runs.POLICY
    if not settings.model.folder:
        exclude = set(table["sentence"])
        pretrain.pretrain(settings.pretrain, settings.prompt, settings.evaluation, exclude=exclude, folder=base)
    tables = training.evaluation_tables(table, settings.evaluation)
    metrics, predictions = training.measure(
        models.load_base(base, settings.model), models.load_tokenizer(base), settings, tables, references={}
    )
    for split, answers in predictions.items():
        answers.to_parquet(partial / runs.predictions_file(split))
    same = {"kl_to_parent": 0.0, "kl_to_base": 0.0}
    runs.write_metrics(
        partial,
        study,
        run="base",
        stage="base",
        parent=None,
        seed=None,
        evaluation={split: values | same for split, values in metrics.items()},
        training={},
        provenance=runs.describe_provenance(study, started, model=training.describe_model(study, base)),
    )
    return runs.publish(partial)


@pytest.fixture(scope="session")
def tiny_results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def built_base(tiny_results):
    """Folder of the finished base run, data run beside it."""
    with results_in(tiny_results):
        make_data(tiny())
        return make_base(tiny())


@pytest.fixture(scope="session")
def prepare(built_base, tiny_results):
    """``training.prepare_stage`` for a run of the tiny study, with some settings changed."""
    from nondecoupling import training

    def prepare(run, seed=0, changes=None):
        study = tiny(changes)
        with results_in(tiny_results):
            return training.prepare_stage(study, run, seed, expected=study.run(run).stage)

    return prepare


@pytest.fixture(scope="session")
def built_sft(prepare):
    from nondecoupling import training

    stage = prepare("sft")
    outcome = training.train_sft(stage)
    return Trained(stage, outcome, runs.publish(training.write_stage(stage, outcome)))


@pytest.fixture
def tiny_study(tiny_results, monkeypatch):
    """The tiny study, with its results where this test run keeps them."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tiny_results))
    return tiny()


@pytest.fixture
def tiny_base(tiny_study, built_base):
    """The tiny study with data and base finished."""
    return tiny_study


@pytest.fixture
def tiny_sft(tiny_base, built_sft):
    """The finished run ``sft`` of seed 0."""
    return built_sft


@pytest.fixture(scope="session")
def nano_prompt():
    return load_study("nano").profile.prompt


@pytest.fixture(scope="session")
def sentences():
    """Sentences of the grammar, with source and label."""
    return grammar.sample_sentences(600, seed=11)


@pytest.fixture(scope="session")
def nano_texts(nano_prompt, sentences):
    """What the embedded tokenizer is trained on: questions, and the parts of a chat often enough to become tokens."""
    questions = [nano_prompt.template.replace("{sentence}", sentence) for sentence in sentences["sentence"]]
    return questions + ["acceptable", "unacceptable", "user\n", "assistant\n", "\n\n"] * 500


@pytest.fixture(scope="session")
def nano_tokenizer(nano_texts):
    from nondecoupling import pretrain

    return pretrain.train_tokenizer(iter(nano_texts), 640)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    from nondecoupling import models

    folder = SHARED / "qwen3-0.6b"
    if not folder.exists():
        pytest.skip(f"needs Qwen3-0.6B's tokenizer in {folder}")
    return models.load_tokenizer(folder)


@pytest.fixture(scope="session")
def cola():
    folder = SHARED / "cola"
    if not folder.exists():
        pytest.skip(f"needs CoLA's TSV files in {folder}")
    return folder


@pytest.fixture
def hand_made():
    """A corpus of three training and two dev sentences."""
    rows = [
        ("train", "a", 1, "", "One sleeps."),
        ("train", "a", 1, "", "Two sleep."),
        ("train", "a", 0, "*", "Two sleeps."),
        ("dev", "b", 0, "*", "Three sleeps."),
        ("dev", "b", 1, "", "Three sleep."),
    ]
    return pd.DataFrame(rows, columns=["split", *corpus.COLUMNS])


def finished_reference(name: str, results: Path) -> Study:
    """Put a copy of a committed reference into ``results``, as a study that is finished there, and return it."""
    root = results / name
    shutil.copytree(runs.REPOSITORY / "results" / "reference" / name, root)
    profile = load_study(runs.read_json(root / "base" / runs.METRICS)["profile"]).profile
    return Study(name=name, profile=profile)
