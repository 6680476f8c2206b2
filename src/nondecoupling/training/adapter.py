"""LoRA in the 16 bits of the weights that it adapts: peft's layer without its passes in float32.

peft keeps an adapter in float32, casts all that enters it and adds what leaves it to the layer's output in float32:
passes over all activations at each linear layer. Here the adapter stays float32, so that small steps add up, and
its two products are computed in the weights' type, straight into the layer's output, as mixed precision does it.
"""

from typing import Any

import torch
from peft.tuners import lora


class LowRank(torch.autograd.Function):
    """x W' + scaling (x A') B' + bias, with gradients for x, A and B: x is (..., in), A (rank, in), B (out, rank)."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        inner = rows @ a.T
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        found = torch.nn.functional.linear(rows, weight, bias).addmm_(inner, b.T, alpha=scaling)
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, inner, weight, a, b = ctx.saved_tensors
        of_found = gradients[0].reshape(-1, gradients[0].shape[-1])
        of_inner = (of_found @ b).mul_(ctx.scaling)
        of_x = (of_found @ weight).addmm_(of_inner, a).view(ctx.shape)
        of_b = (of_found.T @ inner).mul_(ctx.scaling)
        return of_x, None, None, of_inner.T @ rows, of_b, None  # A's and B's are cast to their own type


class LowRankLinear(lora.Linear):
    """peft's LoRA layer, which uses `LowRank` where the adapter has another type than the frozen weights."""

    def forward(self, x, *args, **kwargs):
        weight, active = self.base_layer.weight, self.active_adapters
        if (
            self.disable_adapters
            or len(active) != 1
            or not x.dtype == weight.dtype != self.lora_A[active[0]].weight.dtype
        ):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
        return LowRank.apply(x, weight, self.base_layer.bias, a, b, self.scaling[active[0]])


def use_low_rank(model: torch.nn.Module) -> None:
    """Make all of ``model``'s LoRA layers on plain linear layers `LowRankLinear`; quantised ones stay as peft's."""
    for module in model.modules():
        if type(module) is lora.Linear and type(module.base_layer) is torch.nn.Linear:
            module.__class__ = LowRankLinear
