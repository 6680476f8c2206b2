"""An outside judge: lm-evaluation-harness scores finished policies on the same dev sentences as this project.

The harness is not a dependency of the study (``pip install -e '.[score]'``). It is given the rendered questions and the
two answers with their end of turn, as a multiple-choice task; what it makes of them is its own. It moves white space at
the end of a question to the beginning of the answer, so that its log-likelihood of an answer is that of the white space
more: ``offset``, the same for both answers to a question, and taken off before log-likelihoods are compared.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef

from nondecoupling.study import folders
from nondecoupling.study.contracts import Score
from nondecoupling.study.plan import STATES
from nondecoupling.study.results import label_log_probabilities, likelier_labels
from nondecoupling.study.study import Study
from nondecoupling.task.corpus import fixed_subset, load_checked_corpus
from nondecoupling.task.prompts import around_answers, prompt_messages, rendered, responses
from nondecoupling.training import models
from nondecoupling.training.base import base_folder
from nondecoupling.training.evaluation import predict
from nondecoupling.training.generation import Prefix, batches

FILE = "score.json"
TASK = "nondecoupling_dev"


def write_scores(study: Study, seeds: Sequence[int]) -> None:
    """Score every state of ``seeds`` and write ``score.json`` beside the study's tables; prints a line per policy.

    Raises ImportError where the harness is not installed, FileNotFoundError where a run is not finished.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ImportError("make score needs lm-evaluation-harness: .venv/bin/pip install -e '.[score]'") from None
    root = folders.study_folder(study)
    for seed in seeds:
        for name in STATES:
            folders.require_complete(folders.run_folder(root, study.run(name), seed), "make score")
    models.prepare_libraries()
    rows = []
    for seed in seeds:
        table = fixed_subset(load_checked_corpus(study, seed), "dev", None).reset_index(drop=True)
        for name in STATES:
            rows.append(score(study, name, seed, root, table))
            print(line_of(rows[-1]), flush=True)
    folders.write_json(root / FILE, rows)
    print(root / FILE)


def line_of(row: Score) -> str:
    """One policy's line."""
    both = f"accuracy {row['accuracy']:.4f} (harness {row['harness_accuracy']:.4f}), "
    both += f"MCC {row['mcc']:.4f} ({row['harness_mcc']:.4f})"
    return f"{row['run']}, seed {row['seed']}: {both}, log-likelihoods alike to {row['difference']:.1e}"


def score(study: Study, name: str, seed: int, root: Path, table: pd.DataFrame) -> Score:
    """One finished policy, judged by this project and by the harness, both in float32 on the sentences of ``table``."""
    settings = study.settings_of(study.run(name))
    run, base = study.run(name), base_folder(study, study.base_of(study.run(name)), seed, root)
    exact = settings.model.model_copy(update={"dtype": "float32", "quantization": "none"})
    tokenizer = models.load_tokenizer(base)
    policy: Any = models.load_base(base, exact)
    if run.stage != "base":
        trained = folders.run_folder(root, run, seed) / folders.POLICY
        policy = models.start_policy(base, trained, exact, settings.adaptation, seed)
    policy.eval()
    size = settings.evaluation.batch_size
    ours = predict(policy, tokenizer, settings.prompt, table, size, seed)
    chats = [prompt_messages(settings.prompt, sentence) for sentence in table["sentence"]]
    questions, (before, after) = rendered(tokenizer, chats), around_answers(tokenizer)
    answers = [before + text + after + tokenizer.eos_token for text in responses(settings.prompt)]
    found = harness_log_likelihoods(policy, tokenizer, questions, answers, table["label"].tolist(), size)
    offset = white_space_log_probability(policy, tokenizer, questions, size)
    likelier, labels = likelier_labels(ours), table["label"]
    gap = found["logp"] - offset[:, None] - label_log_probabilities(ours)
    return {
        "run": name,
        "seed": seed,
        "n": len(table),
        "accuracy": float(accuracy_score(labels, likelier)),
        "harness_accuracy": found["acc"],
        "mcc": float(matthews_corrcoef(labels, likelier)),
        "harness_mcc": found["mcc"],
        "offset": float(offset.mean()),
        "difference": float(np.abs(gap).max()),
    }


def harness_log_likelihoods(
    policy: Any, tokenizer: Any, questions: list[str], answers: list[str], labels: list[int], batch_size: int
) -> dict[str, Any]:
    """What the harness finds: ``acc``, ``mcc``, and ``logp`` (questions, 2) of each answer, indexed by label."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"question": q, "label": label} for q, label in zip(questions, labels, strict=True)]
        file = Path(folder) / "dev.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        task = {
            "task": TASK,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": answers,
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "mcc"}],
        }
        judge = HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        with redirect_stderr(StringIO()):  # bars that ask nobody whether they are wanted
            done: Any = simple_evaluate(model=judge, tasks=[task], bootstrap_iters=0, log_samples=True)
    samples = sorted(done["samples"][TASK], key=lambda sample: sample["doc_id"])
    logp = np.array([[float(answer[0][0]) for answer in sample["resps"]] for sample in samples])
    results = done["results"][TASK]
    return {"acc": float(results["acc,none"]), "mcc": float(results["mcc,none"]), "logp": logp}


@torch.inference_mode()
def white_space_log_probability(policy: Any, tokenizer: Any, questions: list[str], batch_size: int) -> np.ndarray:
    """(questions,) log p, nats, of the white space that each question ends with; 0 where it ends with none."""
    whole, bare = (
        tokenizer(texts, add_special_tokens=False)["input_ids"]
        for texts in (questions, [q.rstrip() for q in questions])
    )
    [space] = {tuple(all_of[len(start) :]) for all_of, start in zip(whole, bare, strict=True)}
    if not space:
        return np.zeros(len(questions))
    found: list[float] = []
    for part in batches(bare, batch_size):
        found += Prefix(policy, part, tokenizer.pad_token_id).log_probability(space).tolist()
    return np.array(found)
