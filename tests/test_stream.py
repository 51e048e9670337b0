"""A model block by block: the bits of the whole, and what is no chain of blocks."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, load, quantize, quantize_folder, stream
from sapq_triton.language import draw_sequences
from sapq_triton.packed import BUFFERS, PackedWeight
from sapq_triton.stream import Chain, find_chain
from tests.tiny import llama, save_llama, save_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times. " * 40
SMALL: dict[str, Any] = dict(samples=20, sequence_length=24, group_size=32)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{buffer}": tensor
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
        for buffer in BUFFERS
        if (tensor := module._buffers[buffer]) is not None
    }


def whole(
    source: Path, output_layer: bool = False, skip: tuple[str, ...] = ("lm_head",), **options: Any
) -> dict[str, Tensor]:
    """What `quantize` makes of the model in memory, with the same calibration."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor(AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"])
    batches = draw_sequences(tokens, 20, 24, 0, "").split(8)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    body = (lambda model: model) if output_layer else (lambda model: model.base_model)
    quantize(
        model, batches, QuantSpec(4, 32, True, scale_dtype="float16"), pack=True, progress=False,
        skip=[] if output_layer else skip,
        forward=lambda model, batch: body(model)(input_ids=batch, use_cache=False), **options,
    )  # fmt: skip
    return packed_tensors(model)


def gemma(folder: Path) -> None:
    """Two kinds of attention, each with masks of its own, and tied embeddings."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    save_tokenizer(folder)


def gpt2(folder: Path) -> None:
    """Its layers are transformers' Conv1D."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0,
        eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    save_tokenizer(folder)


def llamas(folder: Path) -> None:
    save_llama(folder, dtype=torch.float32)


@pytest.mark.parametrize("preset", ["best", "fast"])
@pytest.mark.parametrize("make", [llamas, gemma, gpt2])
def test_blocks_come_to_what_the_whole_model_does(
    make: Callable[[Path], None], preset: Any, tmp_path: Path, text: Path
) -> None:
    make(tmp_path / "model")
    expected = whole(tmp_path / "model", preset=preset)
    assert expected
    for spill in (False, True):
        out = tmp_path / str(spill)
        report = quantize_folder(
            tmp_path / "model", out, text, format="sapq", preset=preset, spill=spill,
            **SMALL,
        )  # fmt: skip
        found = packed_tensors(load(out))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
        assert {f"{layer.name}.qweight" for layer in report.layers} < found.keys()
        assert len([*out.glob("model-*.safetensors")]) == report_blocks(out) + 1


def report_blocks(out: Path) -> int:
    config = json.loads((out / "config.json").read_text())
    return int(config.get("num_hidden_layers") or config["n_layer"])


@pytest.mark.parametrize("spill", [False, True])
def test_the_output_layer_comes_last(tmp_path: Path, text: Path, spill: bool) -> None:
    save_llama(tmp_path / "model", dtype=torch.float32)
    expected = whole(tmp_path / "model", output_layer=True)
    report = quantize_folder(
        tmp_path / "model", tmp_path / "out", text, format="sapq", output_layer=True,
        spill=spill, **SMALL,
    )  # fmt: skip
    assert report.layers[-1].name == "lm_head" and report.layers[-1].rows > 0
    found = packed_tensors(load(tmp_path / "out"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_blocks_without_a_layer_to_quantize(tmp_path: Path, text: Path) -> None:
    save_llama(tmp_path / "model", dtype=torch.float32, num_hidden_layers=3)
    skip = ("lm_head", "model.layers.1.*", "*.0.*q_proj")
    expected = whole(tmp_path / "model", skip=skip)
    report = quantize_folder(
        tmp_path / "model", tmp_path / "out", text, format="sapq", skip=skip, **SMALL
    )
    names = {layer.name for layer in report.layers}
    assert len(names) == 7 + 6 and not any(".1." in name for name in names)
    assert report.skipped["model.layers.1.mlp.up_proj"] == "as asked"
    found = packed_tensors(load(tmp_path / "out"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype(tmp_path: Path, text: Path, dtype: str) -> None:
    """Converted block by block; positions are computed as in a model of that dtype."""
    from transformers import AutoModelForCausalLM

    save_llama(tmp_path / "model", dtype=torch.float32)
    quantize_folder(tmp_path / "model", tmp_path / "out", text, format="sapq", dtype=dtype, **SMALL)
    model: Any = load(tmp_path / "out")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=getattr(torch, dtype))
    batches = [torch.arange(24)[None] for _ in range(2)]
    own = find_chain(plain, batches, body, plain.dtype)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    converted = find_chain(stored, batches, body, plain.dtype)
    assert isinstance(own, Chain) and isinstance(converted, Chain)
    assert torch.equal(own.first[1], converted.first[1])
    for number, arguments in own.arguments[0].items():
        other = converted.arguments[0][number]
        torch.testing.assert_close(arguments.kwargs, other.kwargs, rtol=0, atol=0)


def body(model: Any, batch: Tensor) -> object:
    return model.base_model(input_ids=batch, use_cache=False)


# --- chains ---------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """So many linear blocks, run by `way`."""

    def __init__(self, way: Callable[[Any, Tensor], object], count: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.way = way

    def forward(self, x: Tensor) -> object:
        return self.way(self, self.first(x))


def in_order(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def backwards(model: Any, x: Tensor) -> Tensor:
    for block in reversed(model.blocks):
        x = block(x)
    return x


def changed_between(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x) + 1
    return x


def side_by_side(model: Any, x: Tensor) -> Tensor:
    return sum((block(x) for block in model.blocks), x)


def two_times(model: Any, x: Tensor) -> Tensor:
    return in_order(model, in_order(model, x))


def one_left_out(model: Any, x: Tensor) -> Tensor:
    return model.blocks[1](model.blocks[0](x))  # type: ignore[no-any-return]


def call(model: nn.Module, x: Tensor) -> object:
    return model(x)


def chain_of(model: nn.Module) -> Chain | str:
    before = copy.deepcopy(model.state_dict())
    found = find_chain(model, list(torch.randn(2, 3, 4)), call, torch.float32)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    return found


def test_a_chain() -> None:
    model = Blocks(in_order)
    found = chain_of(model)
    assert isinstance(found, Chain)
    assert found.names == ("blocks.0", "blocks.1", "blocks.2") and not found.in_tuples
    x = torch.randn(3, 4)
    for name, arguments in zip(found.names, found.arguments, strict=True):
        block = model.get_submodule(name)
        assert torch.equal(arguments[1].call(block, x), block(x))


@pytest.mark.parametrize("way", [backwards, changed_between, side_by_side, two_times, one_left_out])
def test_blocks_that_are_no_chain(way: Callable[[Any, Tensor], object]) -> None:
    assert chain_of(Blocks(way)) == "the blocks of 'blocks' do not run one after the other"


def test_models_without_blocks() -> None:
    assert chain_of(nn.Linear(4, 4)) == "it has no list of blocks"


def test_blocks_that_share_a_parameter() -> None:
    model = Blocks(in_order)
    model.blocks[2].weight = model.blocks[0].weight
    assert chain_of(model) == "a block of 'blocks' shares a parameter with another part"
    model = Blocks(in_order)
    model.first.weight = model.blocks[0].weight
    assert chain_of(model) == "a block of 'blocks' shares a parameter with another part"


def test_blocks_that_return_something_else() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"activations": x}

    model = Blocks(lambda model, x: model.blocks[0](x)["activations"])
    model.blocks = nn.ModuleList(Odd(4, 4) for _ in range(3))
    assert chain_of(model) == "blocks.0 does not run, or returns something else than activations"


def test_a_model_that_is_no_chain_is_one_part(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "model", dtype=torch.float32)
    expected = whole(tmp_path / "model")
    monkeypatch.setattr("sapq_triton.language.find_chain", lambda *_: "it is none")
    quantize_folder(tmp_path / "model", tmp_path / "out", text, format="sapq", **SMALL)
    found = packed_tensors(load(tmp_path / "out"))
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_gaps_have_what_models_look_at() -> None:
    model = llama(dtype=torch.float32)
    found = find_chain(model, [torch.arange(9)[None]], body, torch.float32)
    assert isinstance(found, Chain)
    stream.leave_gaps(model, found)
    assert not [name for name, _ in model.named_parameters() if "layers" in name]
    x = torch.randn(1, 9, 64)
    out: Any = stream.run_behind(model, torch.arange(9)[None], x, body)
    torch.testing.assert_close(out.last_hidden_state, model.model.norm(x))
