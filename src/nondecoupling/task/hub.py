"""Files from the model hub: pinned revisions, downloaded once, used without a network afterwards."""

import json
from pathlib import Path
from typing import Any, Literal

from nondecoupling.study.inputs import MODEL_FILES

# CoLA as part of GLUE. Its copy has no source column, and both dev sets in one file.
GLUE, GLUE_REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
GLUE_FILES = {"train": "cola/train-00000-of-00001.parquet", "validation": "cola/validation-00000-of-00001.parquet"}

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


def check_model(folder: Path) -> None:
    """Raise ValueError that says why, in seconds, where ``folder`` holds nothing that can be loaded and asked.

    Code that a folder brings is never run, nor is the base loaded that an adapter names.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    def said(name: str) -> dict[str, Any]:
        path = folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it is not the JSON that a model folder has there.")
        return content

    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter and not a whole model: merge it into its base (peft's merge_and_unload), save "
            f"that with its tokenizer, and give its folder."
        )
    kind = said("config.json").get("model_type")
    if not kind:
        raise ValueError(
            f"{folder} holds no model in Hugging Face's format: there is no config.json with a model_type."
        )
    if kind not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{folder} holds a model of the kind '{kind}', which the installed transformers does not have; code that "
            f"comes with a model is not run."
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no weights in safetensors' format, and pickled ones are not read; convert them."
        )
    templates = [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]
    if not any(path.exists() for path in templates) and not said("tokenizer_config.json").get("chat_template"):
        raise ValueError(
            f"{folder} has no chat template, so that nothing says how the model is asked: choose a chat model, or add "
            f"chat_template.jinja."
        )
    check_tokens(folder, said("config.json"))


def check_tokens(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError where the tokenizer in ``folder`` may give ids for which the model of ``config`` has no row.

    Special tokens that neither a chat nor the end of an answer needs may be beyond: Gemma has one of images.
    """
    from transformers import AutoTokenizer

    size = (config.get("text_config") or config).get("vocab_size")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has faults of its own
        raise ValueError(f"The tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    needed = f"{tokenizer.special_tokens_map} {tokenizer.chat_template}"
    added = tokenizer.added_tokens_decoder.items()
    unused = {number for number, token in added if token.special and token.content not in needed}
    last = max(number for number in tokenizer.get_vocab().values() if number not in unused)
    if size and last >= size:
        raise ValueError(
            f"The tokenizer in {folder} has tokens up to number {last}, but the model has embeddings of only {size} "
            f"(config.json's vocab_size): give it the model's own tokenizer, or resize the model's embeddings."
        )
