"""Forward passes of a model: how a batch gets into it, and nothing around it is disturbed."""

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], object]


def feed(model: nn.Module, batch: Any) -> object:
    """The default way to pass a batch to a model; see `quantize`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        taken = [p.kind for p in inspect.signature(model.forward).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL not in taken:
            named = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
            batch = batch[: sum(kind not in named for kind in taken)]
        return model(*batch)
    return model(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch, of whatever form. Never the dict or list itself: `forward` may take
    something out, and runs again."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        values = {key: to_device(value, device) for key, value in batch.items()}
        stays = all(value is batch[key] for key, value in values.items())
        return copy.copy(batch) if stays else values  # a mapping of the user's own stays one
    if isinstance(batch, tuple | list):
        moved = [to_device(value, device) for value in batch]
        if isinstance(batch, list):
            return moved
        return batch._make(moved) if hasattr(batch, "_make") else tuple(moved)  # a namedtuple stays
    return batch


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; train/eval state and random generators as before.

    Neither autocast nor inference mode would reach other threads: both are off.
    So is the fast path of nn.Transformer, which calls no layer, and what torch.compile has made of
    the model, which may call no hook.
    """
    device = next(model.parameters()).device.type
    fastpath = torch.backends.mha.get_fastpath_enabled()
    training = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # imported where anything was compiled, else not for this: it takes a second
    compiles = "torch._dynamo" in sys.modules
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        torch.compiler.set_stance("force_eager") if compiles else nullcontext(),
    ):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, state in training.items():
                module.training = state
            random.setstate(python_state)
            np.random.set_state(numpy_state)
