"""Experts that one tensor holds, taken apart into layers.

transformers 5 keeps the experts of a block as parameters of three dimensions, gate_up_proj [E, 2 I,
H] and down_proj [E, H, I], which no layer holds: nothing that looks for layers can quantize them.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One of them: rows of its tokens [N, H]  ->  [N, H]"""

    def __init__(self, fused: Any, number: int) -> None:
        super().__init__()
        self.names = _names(fused)
        for name in self.names:
            weight, bias = getattr(fused, name)[number], None
            if fused.has_bias:
                bias = getattr(fused, f"{name}_bias")[number]
            self.add_module(name, _linear(weight.mT if fused.is_transposed else weight, bias))
        self._rules = (fused,)  # a module of all experts, not a part of this one

    def forward(self, rows: Tensor) -> Tensor:
        first, last = (self.get_submodule(name) for name in self.names)
        rules: Any = self._rules[0]
        inner = first(rows)
        result: Tensor = last(rules._apply_gate(inner) if rules.has_gate else rules.act_fn(inner))
        return result


class Experts(nn.Module):
    """The experts of a block as modules "0", "1" and so on, with layers gate_up_proj and down_proj.

    Called as the module that it takes apart, whose activation and gate it keeps; its weights move.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.count = len(fused.down_proj)
        for number in range(self.count):
            self.add_module(str(number), Expert(fused, number))
        for name in _names(fused):
            del fused._parameters[name]
            if fused.has_bias:
                del fused._parameters[f"{name}_bias"]
        self.rules = fused
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, index: Tensor, share: Tensor) -> Tensor:
        """hidden_states [N, H]; index int64 [N, K] of each token's experts, share [N, K]: [N, H]"""
        total = torch.zeros_like(hidden_states)
        for number in index.unique().tolist():
            place, token = torch.where(index.T.eq(number))
            rows = self.get_submodule(str(number))(hidden_states[token])
            total.index_add_(0, token, (rows * share[token, place, None]).to(total.dtype))
        return total


def _names(fused: Any) -> tuple[str, str]:
    return "gate_up_proj" if fused.has_gate else "up_proj", "down_proj"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """In the memory of the stack, which may lie in a file, unless that is transposed."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer.requires_grad_(weight.requires_grad)


def is_fused(module: Any) -> bool:
    """Whether a module follows transformers' interface of experts, as far as `Experts` knows it."""
    if not all(
        isinstance(getattr(module, name, None), bool)
        for name in ("has_gate", "has_bias", "is_transposed")
    ):
        return False
    others = ("has_post_expert_norm", "_is_expert_parallel")
    names = _names(module)
    biases = [f"{name}_bias" for name in names] if module.has_bias else []
    return (
        all(_stacked(module._parameters.get(name)) for name in names)
        and all(module._parameters.get(name) is not None for name in biases)
        and not any(getattr(module, name, False) for name in others)
    )


def _stacked(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.ndim == 3 and parameter.is_floating_point()


def unfuse(model: nn.Module) -> list[str]:
    """Take all fused experts of a model apart, in place; the names of their blocks, if any.

    Outputs stay as they are with experts_implementation="eager", and but for rounding with others.
    The layers lie in the memory of the tensors that they were, which is free when the last of a
    block is packed. ValueError where the model itself is such a block, or a block is in two places.
    """
    found = [name for name, module in model.named_modules() if is_fused(module)]
    places = [n for n, m in model.named_modules(remove_duplicate=False) if is_fused(m)]
    if "" in found or len(places) > len(found):
        raise ValueError(f"fused experts must be in one place within a model, got {places}")
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(model.get_submodule(name)))
    return found
