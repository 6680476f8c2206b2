"""What the tests of stages share: a stage's trainer without its run, and the gradients that it takes."""

from contextlib import contextmanager

import pytest
import torch
from transformers import TrainerCallback

from nondecoupling.training import joint, reward_model, rl, sft


@contextmanager
def run_trainer_replaced(function):
    with pytest.MonkeyPatch.context() as patch:
        for module in (sft, rl, joint, reward_model):  # each of which imports it by name
            patch.setattr(module, "run_trainer", function)
        yield


def train(stage):
    """What the notebook of this stage calls."""
    functions = {
        "sft": sft.train_sft,
        "rl": rl.train_rl,
        "joint": joint.train_joint,
        "reward_model": reward_model.train_reward_model,
    }
    return functions[stage.run.stage](stage)


def trainer_of(stage, callback=None):
    """The trainer that a stage would run, without running it."""
    with run_trainer_replaced(lambda stage, build, *_, **__: build(callback or TrainerCallback())):
        return train(stage)


def trained_weights(stage):
    """All trainable weights; trl's frozen reference is not among them."""
    return torch.cat([w.detach().flatten() for w in stage.policy.parameters() if w.requires_grad])


def gradient(policy):
    return torch.cat([w.grad.flatten() for w in policy.parameters() if w.requires_grad]).clone()


def disturb(policy, size=0.13, seed=0):
    """Move the policy away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if weight.requires_grad and "lora_B" in name:
                weight += size * torch.randn(weight.shape, generator=generator)


class Recorder(TrainerCallback):
    """Moves the policy away from its reference at the start, then notes the gradient of every step."""

    def __init__(self, policy, size=0.13, seed=0):
        self.policy, self.disturbance, self.gradients = policy, (size, seed), []

    def on_train_begin(self, args, state, control, **kwargs):
        disturb(self.policy, *self.disturbance)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(gradient(self.policy))
