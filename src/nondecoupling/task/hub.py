"""Files from the model hub: pinned revisions, downloaded once, used without a network afterwards."""

from pathlib import Path
from typing import Any, Literal

# CoLA as part of GLUE. Its copy has no source column, and both dev sets in one file.
GLUE, GLUE_REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
GLUE_FILES = {"train": "cola/train-00000-of-00001.parquet", "validation": "cola/validation-00000-of-00001.parquet"}
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # what transformers reads; nothing pickled

PATIENCE = 3.0  # seconds to wait for the hub's first answer


def fetch_glue() -> dict[str, Path]:
    """CoLA's parquet files of GLUE, "train" and "validation"; ConnectionError if they cannot be had."""
    folder = fetch(GLUE, GLUE_REVISION, "dataset", list(GLUE_FILES.values()), "CoLA's TSV files with DATA=path")
    return {split: folder / name for split, name in GLUE_FILES.items()}


def fetch_model(repository: str, revision: str) -> Path:
    """The folder of a causal LM at a pinned revision; ConnectionError if it cannot be had."""
    return fetch(repository, revision, "model", MODEL_FILES, "a model folder with MODEL=path")


def fetch(repository: str, revision: str, kind: Literal["model", "dataset"], patterns: list[str], instead: str) -> Path:
    """The local folder that holds ``patterns`` of a hub repository; downloads what is not in the cache.

    Raises ConnectionError, within about ten seconds, with the ways out where the hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    what: Any = {"repo_id": repository, "repo_type": kind, "revision": revision, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(**what, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        api = HfApi()
        api.repo_info(repository, repo_type=kind, revision=revision, timeout=PATIENCE)
        print(f"downloading {repository} at {revision[:8]} from {api.endpoint}, once", flush=True)
        return Path(snapshot_download(**what))
    except Exception as error:  # each layer below (hub client, HTTP, TLS, sockets) raises kinds of its own
        raise ConnectionError(
            f"The {kind} {repository} (revision {revision[:8]}) is not on this machine and could not be downloaded "
            f"({type(error).__name__}); give {instead}, or run the embedded study with PROFILE=nano."
        ) from None
