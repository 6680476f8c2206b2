"""Tokenizers, base models and policies: one way to load each, and one to save."""

import json
import logging as python_logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from nondecoupling.study.profile import Adaptation, Model
from nondecoupling.task.prompts import settle_chats
from nondecoupling.training.adapter import use_low_rank

ADAPTER_FILE = "adapter_config.json"
TEMPLATE_SECONDS = 5  # to render a chat, which takes milliseconds


def prepare_libraries() -> None:
    """Switches of the pinned libraries, and silence about what is not used here; a stage calls it before it loads."""
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)  # kernels for 4-bit weights are missing
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change in later versions of trl
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)  # trl's old name
    # cuDNN's attention gave NaN gradients on left-padded batches (torch 2.11 on an H100); the other kernels do not.
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder ``base``, which ends an answer as its chat template does; ValueError if it cannot."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer in {base} has no chat_template; choose a chat model, or add one to its folder."
        )
    try:
        with time_limit(TEMPLATE_SECONDS):
            tokenizer.chat_template = tokenizer.get_chat_template()  # of several, the one without tools
            settle_chats(tokenizer)
    except (TemplateError, TimeoutError, ValueError) as error:
        raise ValueError(f"The tokenizer in {base} cannot be asked: {error}.") from None
    return tokenizer


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError after some seconds, for what a downloaded file may make endless (in the main thread alone)."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"its chat template took more than {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def load_base(base: Path, how: Model) -> PreTrainedModel:
    """The causal language model in folder ``base``, on the GPU where there is one.

    Its weights are held as ``how`` says: in ``dtype``, those of linear layers in 8 bits with ``quantization: 8bit``.
    Raises ValueError for a kind of model that cannot go on from what it has read.
    """
    model = _load(AutoModelForCausalLM, base, how)
    if model._is_stateful or "past_key_values" not in signature(model.forward).parameters:
        raise ValueError(
            f"The model in {base} is of the kind '{model.config.model_type}', which keeps no keys and values of what "
            f"it has read: answers are sampled and scored from there; choose one that does, as Qwen, Llama or Gemma."
        )
    return model


def _load(kind: Any, folder: Path, how: Model, **options: Any) -> PreTrainedModel:
    """A model of class ``kind`` from ``folder``, held as ``how`` says, without dropout; ``options`` change its config.

    Dropout would make the policy that is trained another one than that which answers.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float) and value:
                setattr(part, name, 0.0)
    return kind.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, how.dtype),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True) if how.quantization == "8bit" else None,
        attn_implementation="sdpa"
        if torch.cuda.is_available()
        else "eager",  # what is faster backwards at these lengths
        device_map={"": 0} if torch.cuda.is_available() else None,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )


def _lora(adaptation: Adaptation, task: str) -> LoraConfig:
    """A fresh adapter on every linear layer."""
    return LoraConfig(
        r=adaptation.rank,
        lora_alpha=adaptation.alpha,
        lora_dropout=0.0,  # dropout would make the sampled policy differ from the trained one
        target_modules="all-linear",
        task_type=task,
    )


def start_policy(
    base: Path, parent: Path | None, how: Model, adaptation: Adaptation, seed: int
) -> PreTrainedModel | PeftModel:
    """A trainable policy that equals the parent's: the base model where ``parent`` is None.

    With LoRA the base's weights stay frozen and one adapter, in float32 whatever the base's type, is trained on through
    all stages; it is never merged, because merging rounds the weights. ``seed`` initialises a fresh adapter (which
    starts as the identity).
    """
    if parent is not None and (parent / ADAPTER_FILE).exists() != (adaptation.method == "lora"):
        raise ValueError(f"The policy in {parent} was not trained with adaptation.method={adaptation.method}.")
    if adaptation.method == "full":
        return load_base(parent or base, how)
    if parent is not None:
        policy = PeftModel.from_pretrained(load_base(base, how), parent, is_trainable=True)
        trained: Any = policy.peft_config["default"]
        trained.base_model_name_or_path = str(base)  # or peft asks the hub for it
        if (trained.r, trained.lora_alpha) != (adaptation.rank, adaptation.alpha):
            raise ValueError(
                f"The adapter in {parent} has rank {trained.r} and alpha {trained.lora_alpha}, not adaptation.rank="
                f"{adaptation.rank} and adaptation.alpha={adaptation.alpha}; one adapter goes through all stages."
            )
    else:
        set_seed(seed)
        policy = get_peft_model(load_base(base, how), _lora(adaptation, "CAUSAL_LM"))
    use_low_rank(policy)
    return policy


def start_reward_model(
    base: Path, trained: Path | None, how: Model, adaptation: Adaptation, seed: int, pad: int
) -> PreTrainedModel | PeftModel:
    """A reward model: the base's body with a head that gives one number, read at the last token that is not ``pad``.

    A fresh one (``trained`` is None) is to be trained, head and adapter (or all weights); a finished one is frozen and
    scores answers. ``seed`` initialises head and adapter.
    """
    set_seed(seed)
    whole = trained if trained and adaptation.method == "full" else base
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is meant
    body = _load(AutoModelForSequenceClassification, whole, how, num_labels=1)
    logging.set_verbosity(verbosity)
    body.config.pad_token_id = pad
    scorer: PreTrainedModel | PeftModel = body
    if adaptation.method == "lora":
        adapter = _lora(adaptation, "SEQ_CLS")
        scorer = PeftModel.from_pretrained(body, trained) if trained else get_peft_model(body, adapter)
        use_low_rank(scorer)
    return scorer.eval().requires_grad_(False) if trained else scorer


def save_policy(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write the adapter (LoRA) or all weights (full) to ``folder`` as safetensors."""
    if isinstance(model, PeftModel):
        # "default" is the trained adapter; trl adds a frozen copy of it as the KL reference.
        model.save_pretrained(str(folder), selected_adapters=["default"])
        (folder / "README.md").unlink()  # a form that nobody filled in, with this machine's paths
        config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = "base"  # the study's, wherever that is on which machine
        config["target_modules"] = sorted(config["target_modules"])  # a set, which each process has in another order
        (folder / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        model.save_pretrained(folder)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
