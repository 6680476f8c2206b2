"""The base model of a study: a user's folder, the hub's, or one that was pretrained here; and its run."""

from datetime import datetime
from pathlib import Path
from typing import Any

from nondecoupling.study import folders, provenance
from nondecoupling.study.plan import Run
from nondecoupling.study.study import Study
from nondecoupling.task import hub
from nondecoupling.training.evaluation import Measured


def base_folder(study: Study, run: Run, seed: int, root: Path | None = None) -> Path:
    """Where a base's files are; downloads them where the profile names a hub id that is not in the cache.

    ``root`` is the folder of the study's results, unless they are elsewhere. ValueError where a folder of the user's
    holds no model.
    """
    model = study.profile.model
    if model.folder:
        hub.check_model(Path(model.folder))
        return Path(model.folder)
    if model.hub:
        return hub.fetch_model(model.hub, str(model.revision))
    return folders.run_folder(root or folders.study_folder(study), run, seed) / folders.POLICY


def describe_model(study: Study, base: Path) -> dict[str, Any]:
    """Which base model this is: id, revision and the sha256 of its weights.

    Raises ValueError with both hashes where the profile pins other weights for its hub id.
    """
    model, hashes = study.profile.model, folders.file_hashes(base, "*.safetensors")
    if model.folder:
        return {"id": Path(model.folder).name, "sha256": hashes}
    if not model.hub:
        return {"id": "pretrained by 02_base", "sha256": hashes}
    if model.sha256 and list(hashes.values()) != [model.sha256]:
        raise ValueError(f"The weights in {base} have sha256 {hashes}, but the profile pins {model.sha256}.")
    return {"id": model.hub, "revision": model.revision, "sha256": hashes}


def publish_base(
    study: Study,
    run: Run,
    seed: int,
    partial: Path,
    base: Path,
    measured: Measured,
    training: dict[str, Any],
    started: datetime,
) -> Path:
    """Publish a base run, whose model is in ``base``, from its ``partial`` folder; returns the result's."""
    metrics, answers = measured
    for split, table in answers.items():
        table.to_parquet(partial / folders.answers_file(split))
    same = {"kl_to_parent": 0.0, "kl_to_base": 0.0}  # the base is its own reference
    evaluation = {split: values | same for split, values in metrics.items()}
    root = folders.study_folder(study)
    data = folders.read_json(folders.run_folder(root, study.run("data"), seed) / folders.METRICS)["provenance"]
    known = {"data_sha256": data["data_sha256"], "model": describe_model(study, base)}
    provenance.write_metrics(root, partial, study, run, seed, started, evaluation, training, **known)
    return folders.publish(partial)
