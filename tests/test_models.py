"""Policies: a stage starts exactly where its parent ended, and a saved policy is the one that was trained."""

import json

import pytest
import torch
from peft import PeftModel

from nondecoupling.study.profile import Adaptation, Model
from nondecoupling.training import models

PLAIN = Model(folder=None, quantization="none", dtype="float32")
LORA = Adaptation(method="lora", rank=4, alpha=8)
FULL = Adaptation(method="full", rank=4, alpha=8)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def base(built_base):
    return built_base / "policy"


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def change(model):
    """What training would do: move every trainable weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("adaptation", [LORA, FULL], ids=["lora", "full"])
def test_a_fresh_policy_equals_the_base(base, adaptation):
    assert torch.equal(
        logits(models.start_policy(base, None, PLAIN, adaptation, seed=3)), logits(models.load_base(base, PLAIN))
    )


@pytest.mark.parametrize("adaptation", [LORA, FULL], ids=["lora", "full"])
def test_a_saved_policy_is_the_one_that_was_trained(base, adaptation, tmp_path):
    policy = models.start_policy(base, None, PLAIN, adaptation, seed=3)
    change(policy)
    models.save_policy(policy, tmp_path / "policy")
    again = models.start_policy(base, tmp_path / "policy", PLAIN, adaptation, seed=4)
    assert torch.equal(logits(again), logits(policy))
    assert not torch.equal(logits(again), logits(models.load_base(base, PLAIN)))
    assert models.count_parameters(again) == models.count_parameters(policy)  # it can be trained on
    assert not [path for path in (tmp_path / "policy").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_adapter_is_saved_without_the_reference_beside_it(base, tmp_path):
    policy = models.start_policy(base, None, PLAIN, LORA, seed=3)
    policy.add_adapter("ref", policy.peft_config["default"])
    models.save_policy(policy, tmp_path / "policy")
    assert not (tmp_path / "policy" / "ref").exists()
    assert (tmp_path / "policy" / "adapter_model.safetensors").exists()
    config = json.loads((tmp_path / "policy" / models.ADAPTER_FILE).read_text())
    assert config["base_model_name_or_path"] == "base"  # on whichever machine


def test_lora_trains_an_adapter_of_every_linear_layer_and_nothing_else(base):
    policy = models.start_policy(base, None, PLAIN, LORA, seed=3)
    assert isinstance(policy, PeftModel)
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert all(".lora_" in name for name in trained)
    layers = policy.config.num_hidden_layers
    assert len(trained) == layers * 7 * 2  # q, k, v, o, gate, up, down; A and B each
    hidden, inner = policy.config.hidden_size, policy.config.intermediate_size
    width = policy.config.num_attention_heads * policy.config.head_dim
    per_layer = 4 * (hidden + width) + 3 * (hidden + inner)
    count, total = models.count_parameters(policy)
    assert count == LORA.rank * layers * per_layer
    assert total == count + models.count_parameters(models.load_base(base, PLAIN))[1]


def test_full_trains_everything(base):
    count, total = models.count_parameters(models.start_policy(base, None, PLAIN, FULL, seed=3))
    assert count == total


def test_the_seed_decides_the_adapters_start(base):
    def start(seed):
        policy = models.start_policy(base, None, PLAIN, LORA, seed=seed)
        return torch.cat([weight.flatten() for weight in policy.parameters() if weight.requires_grad])

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


@pytest.mark.parametrize(("trained", "asked"), [(LORA, FULL), (FULL, LORA)])
def test_a_policy_trained_by_another_method_is_refused(base, tmp_path, trained, asked):
    models.save_policy(models.start_policy(base, None, PLAIN, trained, seed=3), tmp_path / "policy")
    with pytest.raises(ValueError, match=f"policy was not trained with adaptation.method={asked.method}"):
        models.start_policy(base, tmp_path / "policy", PLAIN, asked, seed=3)


def test_a_tokenizer_without_a_chat_template_is_refused(nano_tokenizer, tmp_path):
    plain = nano_tokenizer.__class__(tokenizer_object=nano_tokenizer._tokenizer, eos_token=nano_tokenizer.eos_token)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat_template") as caught:
        models.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_that_names_no_end_takes_its_templates(nano_tokenizer, tmp_path):
    bare = nano_tokenizer.__class__(
        tokenizer_object=nano_tokenizer._tokenizer, chat_template=nano_tokenizer.chat_template
    )
    bare.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(tmp_path)
    assert loaded.eos_token == loaded.pad_token == nano_tokenizer.eos_token == "<|im_end|>"


def test_a_saved_tokenizer_is_the_same(nano_tokenizer, tmp_path):
    nano_tokenizer.save_pretrained(tmp_path)
    again = models.load_tokenizer(tmp_path)
    text = "The boys slept.\n\nacceptable<|im_end|>"
    assert again(text)["input_ids"] == nano_tokenizer(text)["input_ids"]
    assert again.chat_template == nano_tokenizer.chat_template


def test_weights_are_read_in_full_precision(base):
    assert {weight.dtype for weight in models.load_base(base, PLAIN).parameters()} == {torch.float32}


def test_an_adapter_is_not_continued_at_another_rank(prepare, built_sft):
    with pytest.raises(ValueError, match=r"has rank 16 .*adaptation\.rank=4"):
        prepare("sft-rl", changes={"adaptation.rank": 4})
