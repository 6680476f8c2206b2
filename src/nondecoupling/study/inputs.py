"""The files of a user's folders that are read, under the names that corpora and models are published with."""

import re
from pathlib import Path

# CoLA's and RuCoLA's names, GLUE's, JCoLA's (which ends in its version), and those of data sets on the hub.
NAMES = {
    "train": "in_domain_train|train",
    "dev": "in_domain_(dev|valid|validation)|dev|valid|validation",
    "dev_out": "out_of_domain_(dev|valid|validation)",
}
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model"]  # nothing pickled


def data_files(folder: Path) -> dict[str, Path]:
    """The corpus's file of each split in ``folder``, as far as there is one; ValueError where two might be meant."""
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        for split, names in NAMES.items():
            if re.fullmatch(rf"({names})(-v[0-9.]+)?\.(tsv|csv|jsonl?)", path.name):
                if split in found:
                    raise ValueError(f"{folder} holds {found[split].name} and {path.name}; leave one of them there.")
                found[split] = path
    return {split: found[split] for split in NAMES if split in found}


def model_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that a model may be loaded from."""
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
