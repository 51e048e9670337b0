"""Small models for the tests of files: random codes, a random Llama, a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapq_triton import QuantSpec
from sapq_triton import layers as layers_of
from sapq_triton.packed import PackedWeight, pack_weight, to_packed

ROWS, COLUMNS = 96, 64


class Net(nn.Module):
    """Two linear layers that any format holds, and tensors that are nobody's codes."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.first = nn.Linear(COLUMNS, ROWS, dtype=dtype)
        self.norm = nn.LayerNorm(ROWS, dtype=dtype)
        self.second = nn.Linear(ROWS, COLUMNS, bias=False, dtype=dtype)
        self.head = nn.Linear(COLUMNS, 5, dtype=dtype)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x))))


def pack_randomly(module: nn.Module, spec: QuantSpec, lowest_zero: int = 1) -> PackedWeight:
    """Random codes, scales and zero points, all extremes among them."""
    groups, rows, columns = layers_of.matrix_shape(module)
    R, G = groups * rows, columns // spec.columns_per_group(columns)
    codes = torch.randint(0, 2**spec.bits, (R, columns), dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, spec.qmax])
    scale = (torch.rand(R, G) * 0.1 + 0.01).mul(2.0 ** (4 - spec.bits))
    scale = scale.to(getattr(torch, spec.scale_dtype))
    zero = torch.randint(lowest_zero, 2**spec.bits, (R, G), dtype=torch.uint8)
    zero[0, 0], zero[-1, -1] = lowest_zero, spec.qmax
    if spec.symmetric:
        zero.fill_(2 ** (spec.bits - 1))
    return to_packed(module, spec, pack_weight(codes, scale, zero, spec))


def packed_net(
    spec: QuantSpec, second: QuantSpec | None = None, dtype: torch.dtype = torch.float16
) -> Net:
    net = Net(dtype)
    pack_randomly(net.first, spec)
    pack_randomly(net.second, second or spec)
    return net


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy, for comparison."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


def llama(dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    small: dict[str, Any] = dict(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    config = LlamaConfig(**{**small, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def save_tokenizer(folder: Path) -> None:
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_llama(folder: Path, **options: Any) -> Any:
    """As transformers saves it, with its tokenizer."""
    model = llama(**options)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


MIXED = 24  # numbers of a token


class Mixture(nn.Module):
    """A gate, experts, and what comes behind them, in one block."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(MIXED, count)
        self.experts = nn.ModuleList(Gated() for _ in range(count))
        self.behind = nn.Linear(MIXED, MIXED)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.gate(x).argmax(1)
        out = torch.zeros_like(x)
        for number in expert.unique().tolist():
            out[expert == number] = self.experts[number](x[expert == number])
        result: Tensor = self.behind(out)
        return result


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(MIXED, 16), nn.Linear(MIXED, 16)
        self.down = nn.Linear(16, MIXED, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


def mixture(count: int = 6) -> tuple[nn.Sequential, list[Tensor]]:
    model = nn.Sequential(nn.Linear(MIXED, MIXED), Mixture(count), nn.Linear(MIXED, 4))
    return model, [*torch.randn(5, 150, MIXED)]
