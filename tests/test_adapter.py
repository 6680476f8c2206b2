"""The adapter's products in the weights' own type: peft's numbers, up to that type's rounding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora

from nondecoupling.training.adapter import LowRank, LowRankLinear, use_low_rank


def layer(kind, bias):
    """A network of one adapted linear layer whose adapter does something, and an input to it."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).to(kind)
    adapted = get_peft_model(network, LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    for weight in adapted.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return adapted, torch.randn(3, 5, 24, dtype=kind)


def found(network, x):
    """Output and gradients for input and adapter, one long vector of float64."""
    x = x.clone().requires_grad_()
    y = network(x)
    network.zero_grad()
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    trained = [weight.grad for weight in network.parameters() if weight.requires_grad]
    assert all(gradient.dtype == torch.float32 for gradient in trained)
    return torch.cat([part.detach().double().flatten() for part in (y, x.grad, *trained)])


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_peft_in_float32(bias):
    network, x = layer(torch.float32, bias)
    wanted = found(network, x)
    module = next(part for part in network.modules() if type(part) is lora.Linear)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    module.forward = lambda x: LowRank.apply(
        x, module.base_layer.weight, module.base_layer.bias, a, b, module.scaling["default"]
    )
    torch.testing.assert_close(found(network, x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_in_16_bits_it_is_as_near_to_the_truth_as_these_can_be(bias):
    network, x = layer(torch.bfloat16, bias)
    peft = found(network, x)
    use_low_rank(network)
    assert [type(part) for part in network.modules()].count(LowRankLinear) == 1
    ours = found(network, x)
    truth = found(network.float(), x.float())
    assert not torch.equal(ours, peft)
    assert (ours - truth).norm() < torch.finfo(torch.bfloat16).eps * truth.norm()


def test_another_adapter_no_adapter_and_one_type_are_read_as_peft_reads_them():
    network, x = layer(torch.float32, True)
    wanted, bare = network(x), network.base_model.model[0].base_layer(x)
    use_low_rank(network)
    assert torch.equal(network(x), wanted)
    with network.disable_adapter():
        assert torch.equal(network(x), bare)
    network.bfloat16().add_adapter("ref", network.peft_config["default"])  # starts as the identity
    network.set_adapter("ref")
    x = x.bfloat16()
    assert torch.equal(network(x), network.base_model.model[0].base_layer(x))


def test_bfloat16_loses_steps_of_less_than_a_512th_of_a_weight():
    """Why adapters are float32; none of more than a 256th is lost."""
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for sign in (1, -1):
        assert ((weights * (1 + sign / 513)).bfloat16() == weights.bfloat16()).all()
        assert not ((weights * (1 + sign / 250)).bfloat16() == weights.bfloat16()).any()


def test_half_precision_loses_small_steps():
    """What docs/real-models.md says of bfloat16 weights, for all that there are between two powers of two."""
    weights = torch.arange(128, 257).div(128).bfloat16()
    for side in (1, -1):
        assert torch.equal((weights.double() * (1 + side * 0.999 / 512)).bfloat16(), weights)
        assert not torch.equal((weights.double() * (1 + side * 1.01 / 256)).bfloat16(), weights)
