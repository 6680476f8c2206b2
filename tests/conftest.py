"""A study so small that its stages take a second: the same code as a real one, in a folder of its own."""

import gc
import os
import time

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
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from nondecoupling.study import folders, provenance
from nondecoupling.study.study import Study, load_study
from nondecoupling.task import corpus, grammar

gc.disable()  # until all test files are imported, with a million objects that stay


def pytest_collection_finish(session):
    """They are passed over from here on: looking for garbage among them takes half a second for each trainer."""
    gc.freeze()
    gc.enable()


SHARED = folders.REPOSITORY.parent / "shared"


class Trained(NamedTuple):
    """A finished stage: what it started from, what training returned, and the published folder."""

    stage: object
    outcome: object
    folder: Path


def tiny(changes: dict | None = None) -> Study:
    """The study of profiles/tiny.yaml; its folder has the same name whatever ``changes`` are."""
    return replace(load_study("tiny", overrides=changes), name="tiny")


def apart_and_together(tokenizer, prompt, sentence, response):
    """Token ids of question and answer, each by itself, and of the chat that holds both, as far as the answer's end."""
    from nondecoupling.task import prompts

    chat = [*prompts.prompt_messages(prompt, sentence), {"role": "assistant", "content": response}]
    [whole] = prompts.ids_of(tokenizer, prompts.rendered(tokenizer, [chat], asking=False))
    apart = [*prompts.prompt_ids(tokenizer, prompt, [sentence])[0], *prompts.response_ids(tokenizer, response)]
    return apart, whole[: len(apart)]


@contextmanager
def results_in(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NONDECOUPLING_RESULTS", str(folder))
        yield


def make_data(study: Study, seed: int = 0) -> Path:
    """What chapter 1 does."""
    started = provenance.now()
    partial = folders.open_run(folders.study_folder(study), study.run("data"), seed)
    folder = corpus.collect_corpus(study.profile.data, seed, partial)
    return corpus.publish_corpus(study, seed, partial, folder, started)


def make_base(study: Study, seed: int = 0) -> Path:
    """What chapter 2 does."""
    from nondecoupling.training import base as bases
    from nondecoupling.training import evaluation, models, pretrain

    started, settings, run = provenance.now(), study.profile, study.run("base")
    table = corpus.load_checked_corpus(study, seed)
    partial = folders.open_run(folders.study_folder(study), run, seed)
    base = bases.base_folder(study, run, seed) if settings.model.folder else partial / folders.POLICY
    if not settings.model.folder:
        exclude = set(table["sentence"])
        pretrain.pretrain(settings.pretrain, settings.data, settings.prompt, exclude, base, seed)
    policy, tokenizer = models.load_base(base, settings.model), models.load_tokenizer(base)
    tables = evaluation.evaluation_tables(table, settings.evaluation)
    measured = evaluation.measure_policy(policy, tokenizer, settings, seed, tables, references={})
    return bases.publish_base(study, run, seed, partial, base, measured, {}, started)


@pytest.fixture(scope="session")
def tiny_results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def built_base(tiny_results):
    """Folder of the finished base run of seed 0; data beside it, and both of seed 1."""
    with results_in(tiny_results):
        for seed in (1, 0):
            make_data(tiny(), seed)
            base = make_base(tiny(), seed)
        return base


@pytest.fixture(scope="session")
def prepare(built_base, tiny_results):
    """``prepare_stage`` for a run of the tiny study, with some settings changed."""
    from nondecoupling.training.stage import prepare_stage

    def prepare(run, seed=0, changes=None):
        study = tiny(changes)
        with results_in(tiny_results):
            return prepare_stage(study, run, seed, expected=study.run(run).stage)

    return prepare


@pytest.fixture(scope="session")
def built_sft(prepare, tiny_results):
    from nondecoupling.training.sft import train_sft
    from nondecoupling.training.stage import publish_stage

    with results_in(tiny_results):
        stage = prepare("sft")
        outcome = train_sft(stage)
        return Trained(stage, outcome, publish_stage(stage, outcome))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder for the results of a test."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


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
def warm_server():
    """Environment variables by which a study, or a notebook, has kernels of one server that all tests share."""
    from nondecoupling.workflow import kernels, notebooks

    before = dict(os.environ)
    notebooks.quiet_environment(tiny(), jobs=1)
    with kernels.warm_kernels():
        address = os.environ[kernels.ADDRESS]
        os.environ.clear()
        os.environ.update(before)
        end = time.monotonic() + 600
        while not Path(address).is_socket():
            assert time.monotonic() < end, "the server of kernels is not ready"
            time.sleep(0.1)
        yield {kernels.ADDRESS: address}


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
    from nondecoupling.training import pretrain

    return pretrain.train_tokenizer(iter(nano_texts), 640)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    from nondecoupling.training import models

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
