"""Files of packed models: what is written, what is read, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapq_triton import QuantSpec, load, quantize, save
from sapq_triton.formats import FORMATS
from sapq_triton.formats.folder import raw, sha256, write_manifest
from sapq_triton.packed import to_packed
from tests.tiny import (
    COLUMNS,
    ROWS,
    Net,
    assert_same_state,
    llama,
    pack_randomly,
    packed_net,
    state,
)

W4 = QuantSpec(4, 32, True, scale_dtype="float16")
ASYMMETRIC = replace(W4, symmetric=False)
GRIDS = [
    pytest.param(
        format, QuantSpec(bits, group, symmetric, scale_dtype="float16"),
        id=f"{format}-{bits}-{'symmetric' if symmetric else 'asymmetric'}-{group}",
    )
    for format in FORMATS
    for bits in ((2, 3, 4, 8) if "gptq" in format else range(2, 9))
    for symmetric, group in ((True, 32), (False, 16), (False, -1))
]  # fmt: skip


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """As another program might have written the folder: no manifest."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "sapq.json").unlink(missing_ok=True)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "sapq.json").unlink(missing_ok=True)


def quantization_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]


# round trips


@pytest.mark.parametrize("format, spec", GRIDS)
def test_a_model_comes_back_as_it_was(tmp_path: Path, format: str, spec: QuantSpec) -> None:
    net = packed_net(spec)
    save(net, tmp_path / "net", format)
    loaded = load(tmp_path / "net", Net())
    assert_same_state(loaded, state(net))
    assert loaded.first.spec == spec
    torch.testing.assert_close(loaded.first.weight, net.first.weight, rtol=0, atol=0)


@pytest.mark.parametrize("format, spec", [grid for grid in GRIDS if grid.values[0] != "sapq"])
def test_without_our_manifest_the_files_say_enough(
    tmp_path: Path, format: str, spec: QuantSpec
) -> None:
    net = packed_net(spec)
    save(net, tmp_path / "net", format)
    (tmp_path / "net" / "sapq.json").unlink()
    assert_same_state(load(tmp_path / "net", Net()), state(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compressed_tensors_has_scales_in_the_dtype_of_the_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    net = packed_net(replace(W4, scale_dtype=name), dtype=dtype)  # type: ignore[arg-type]
    save(net, tmp_path / "net", "compressed-tensors")
    assert load_file(tmp_path / "net" / "model.safetensors")["first.weight_scale"].dtype == dtype
    assert_same_state(load(tmp_path / "net", Net(dtype)), state(net))


def test_scales_that_the_dtype_of_the_model_holds_exactly_may_be_of_another(tmp_path: Path) -> None:
    net = packed_net(W4, dtype=torch.float32)
    save(net, tmp_path / "net", "compressed-tensors")
    loaded = load(tmp_path / "net", Net(torch.float32))
    assert loaded.first.spec == replace(W4, scale_dtype="float32")
    torch.testing.assert_close(loaded.first.weight, net.first.weight, rtol=0, atol=0)


class Zoo(nn.Module):
    """A layer of every kind, of odd sizes; one weight shared by two layers, one by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(33, 7)
        self.conv1d = nn.Conv1d(4, 6, 3)
        self.conv2d = nn.Conv2d(4, 6, (1, 3), groups=2, bias=False)
        self.conv3d = nn.Conv3d(2, 3, 2)
        self.transposed1d = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.transposed2d = nn.ConvTranspose2d(4, 6, 3)
        self.transposed3d = nn.ConvTranspose3d(2, 2, 2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.twin = nn.Linear(33, 7)
        self.twin.weight = self.linear.weight
        self.embedding = nn.Embedding(5, 33)
        self.output = nn.Linear(33, 5, bias=False)
        self.output.weight = self.embedding.weight

    KINDS = ("linear", "conv1d", "conv2d", "conv3d", "transposed1d", "transposed2d", "transposed3d")


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_sapq_holds_every_kind_of_layer(tmp_path: Path, scale_dtype: Any) -> None:
    zoo = Zoo()
    for bits, name in zip(range(2, 9), Zoo.KINDS, strict=True):
        spec = QuantSpec(bits, symmetric=bits % 2 == 0, scale_dtype=scale_dtype)
        module = pack_randomly(zoo.get_submodule(name), spec, lowest_zero=0)
        if name == "linear":
            zoo.twin.__class__, zoo.twin.spec = type(module), spec
            zoo.twin.weight_dtype = zoo.twin._parameters.pop("weight").dtype
            for buffer in ("qweight", "scale", "qzeros"):
                zoo.twin.register_buffer(buffer, getattr(module, buffer))
    save(zoo, tmp_path / "zoo")
    stored = load_file(tmp_path / "zoo" / "model.safetensors")
    assert "twin.qweight" not in stored and "output.weight" not in stored  # once each
    loaded = load(tmp_path / "zoo", Zoo())
    assert_same_state(loaded, state(zoo))
    assert loaded.output.weight is loaded.embedding.weight
    for name in (*Zoo.KINDS, "twin"):
        ours, theirs = zoo.get_submodule(name), loaded.get_submodule(name)
        assert type(theirs) is type(ours) and theirs.spec == ours.spec
        torch.testing.assert_close(theirs.weight, ours.weight, rtol=0, atol=0)


def test_conv1d_of_transformers(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    for format in ("sapq", "gptq"):
        plain, other = nn.Sequential(Conv1D(ROWS, COLUMNS)), nn.Sequential(Conv1D(ROWS, COLUMNS))
        pack_randomly(plain[0], W4)
        save(plain, tmp_path / format, format)
        assert_same_state(load(tmp_path / format, other), state(plain))


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_is_one_layer(tmp_path: Path, format: str, manifest: bool) -> None:
    layer = pack_randomly(nn.Linear(COLUMNS, ROWS).half(), ASYMMETRIC)
    save(layer, tmp_path / "layer", format)
    assert all("." not in name for name in load_file(tmp_path / "layer" / "model.safetensors"))
    if not manifest and format != "sapq":
        (tmp_path / "layer" / "sapq.json").unlink()
    loaded = load(tmp_path / "layer", nn.Linear(COLUMNS, ROWS).half())
    assert_same_state(loaded, state(layer))
    torch.testing.assert_close(loaded.weight, layer.weight, rtol=0, atol=0)


def test_a_bias_of_zeros_that_a_model_of_one_layer_does_not_have(tmp_path: Path) -> None:
    layer = pack_randomly(nn.Linear(COLUMNS, ROWS).half(), ASYMMETRIC)
    nn.init.zeros_(layer.bias)
    save(layer, tmp_path / "layer", "gptq")
    loaded = load(tmp_path / "layer", nn.Linear(COLUMNS, ROWS, bias=False).half())
    torch.testing.assert_close(loaded.weight, layer.weight, rtol=0, atol=0)


@pytest.mark.parametrize("size", ["5GB", 4000])
def test_tensors_that_share_their_memory(tmp_path: Path, size: int | str) -> None:
    """Tied without being one: parameters by `.data`, packed twins by `load_state_dict`."""

    def net() -> Net:
        model = Net()
        model.other = nn.LayerNorm(ROWS).half()
        model.other.weight = nn.Parameter(model.norm.weight.data)
        model.twin = nn.Linear(COLUMNS, ROWS).half()
        model.twin.weight = model.first.weight
        return model

    model = net()
    pack_randomly(model.first, W4)
    to_packed(model.twin, W4, model.first._buffers)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.first.qweight is not model.twin.qweight
    save(model, tmp_path / "net", max_shard_size=size)
    loaded = load(tmp_path / "net", net())
    assert_same_state(loaded, state(model))
    assert loaded.first.qweight is loaded.twin.qweight


def test_shards(tmp_path: Path) -> None:
    net = packed_net(W4)
    save(net, tmp_path / "net", "gptq", max_shard_size=4000)
    shards = sorted(path.name for path in (tmp_path / "net").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert_same_state(load(tmp_path / "net", Net()), state(net))


def test_views_and_other_tensors_keep_their_values(tmp_path: Path) -> None:
    net = packed_net(W4)
    everything = torch.randn(4, 6)
    net.register_buffer("view", everything[:, 1:3])
    net.register_buffer("transposed", everything.T)
    net.register_buffer("nan", torch.tensor([torch.nan, -0.0]))
    net.register_buffer("empty", everything[:0])
    save(net, tmp_path / "net")
    other = Net()
    for name in ("view", "transposed", "nan", "empty"):
        other.register_buffer(name, torch.zeros_like(getattr(net, name)))
    load(tmp_path / "net", other)
    assert torch.equal(other.view, net.view) and torch.equal(other.transposed, net.transposed)
    assert other.nan.isnan().tolist() == [True, False] and other.nan[1].signbit()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_transformers_builds_the_model_from_its_config(
    tmp_path: Path, format: str, tied: bool
) -> None:
    model = llama(attention_bias=True, tie_word_embeddings=tied)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            pack_randomly(module, W4)
    save(model, tmp_path / "llama", format)
    loaded: Any = load(tmp_path / "llama")
    assert not loaded.training and loaded.dtype == torch.float16
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_same_state(loaded, state(model))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_the_manifest_describes_the_folder(tmp_path: Path) -> None:
    save(packed_net(W4), tmp_path / "net", "gptq", files=[Path(__file__)])
    manifest = json.loads((tmp_path / "net" / "sapq.json").read_text())
    present = {path.name for path in (tmp_path / "net").iterdir()}
    assert manifest["files"].keys() | {"sapq.json"} == present
    assert {
        "model.safetensors",
        "config.json",
        "quantize_config.json",
        Path(__file__).name,
    } < present
    assert manifest["format"] == "gptq" and manifest["version"] == 1
    assert manifest["layers"]["first"]["shape"] == [ROWS, COLUMNS]
    assert manifest["layers"]["first"]["spec"]["group_size"] == 32


# the formats, by the letter


def bits_of(words: list[int], bits: int, count: int) -> list[int]:
    """Codes of a stream, from the lowest bit of the first word, by one large integer."""
    stream = sum((word & 0xFFFFFFFF) << (32 * number) for number, word in enumerate(words))
    return [stream >> (bits * number) & (2**bits - 1) for number in range(count)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("format, offset", [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_tensors(tmp_path: Path, format: str, offset: int, bits: int) -> None:
    net = packed_net(replace(ASYMMETRIC, bits=bits))
    save(net, tmp_path / "net", format)
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    assert tensors["first.qweight"].shape == (COLUMNS * bits // 32, ROWS)
    assert tensors["first.qzeros"].shape == (2, ROWS * bits // 32)
    by_column = [bits_of(column, bits, COLUMNS) for column in tensors["first.qweight"].T.tolist()]
    assert by_column == net.first.codes().tolist()
    zeros = [bits_of(row, bits, ROWS) for row in tensors["first.qzeros"].tolist()]
    assert zeros == (net.first.zero_points().T.int() - offset).tolist()
    assert torch.equal(tensors["first.scales"], net.first.scale.T)
    assert tensors["first.scales"].dtype == torch.float16
    assert tensors["first.g_idx"].tolist() == [column // 32 for column in range(COLUMNS)]
    assert tensors["first.g_idx"].dtype == torch.int32
    assert torch.equal(tensors["first.bias"], net.first.bias)


def test_symmetric_zero_points_of_gptq_are_the_usual_words(tmp_path: Path) -> None:
    for bits, word in ((2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)):
        save(packed_net(replace(W4, bits=bits)), tmp_path / "net", "gptq")
        zeros = load_file(tmp_path / "net" / "model.safetensors")["first.qzeros"]
        assert zeros.unique().tolist() == [word]


@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_tensors(tmp_path: Path, bits: int) -> None:
    net = packed_net(replace(ASYMMETRIC, bits=bits))
    save(net, tmp_path / "net", "compressed-tensors")
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    rows = [bits_of(row, bits, COLUMNS) for row in tensors["first.weight_packed"].tolist()]
    assert rows == net.first.codes().tolist()
    zeros = [
        bits_of(column, bits, ROWS) for column in tensors["first.weight_zero_point"].T.tolist()
    ]
    assert zeros == net.first.zero_points().T.tolist()
    assert tensors["first.weight_shape"].tolist() == [ROWS, COLUMNS]
    assert torch.equal(tensors["first.weight_scale"], net.first.scale)


def test_gptq_config(tmp_path: Path) -> None:
    other = QuantSpec(8, -1, False, scale_dtype="float16")
    net = packed_net(W4, other)
    net.third = pack_randomly(nn.Linear(COLUMNS, ROWS).half(), W4)
    save(net, tmp_path / "net", "gptq")
    config = quantization_config(tmp_path / "net")
    alone = json.loads((tmp_path / "net" / "quantize_config.json").read_text())
    assert config == alone
    quantizer = config.pop("meta")["quantizer"]
    try:
        assert quantizer[0] == f"sapq-triton:{version('sapq-triton')}"
    except PackageNotFoundError:  # a mere checkout
        assert quantizer[0] == "sapq-triton"
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32",
        "dynamic": {
            "+:^second$": {"bits": 8, "group_size": -1, "sym": False},
            "-:^head$": {},
        },
    }  # fmt: skip
    fresh = Net()
    fresh.third = nn.Linear(COLUMNS, ROWS).half()
    assert_same_state(load(tmp_path / "net", fresh), state(net))


def test_compressed_tensors_config(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32,
               "strategy": "group", "dynamic": False}  # fmt: skip
    save(packed_net(W4), tmp_path / "net", "compressed-tensors")
    config = quantization_config(tmp_path / "net")
    assert config["ignore"] == ["head"] and config["format"] == "pack-quantized"
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["weights"] == weights

    net = packed_net(W4, QuantSpec(8, -1, False, scale_dtype="float16"))
    save(net, tmp_path / "net", "compressed-tensors")
    groups = quantization_config(tmp_path / "net")["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["first"], ["second"]]
    assert groups["group_1"]["weights"] == {
        "num_bits": 8, "type": "int", "symmetric": False, "group_size": -1,
        "strategy": "channel", "dynamic": False,
    }  # fmt: skip
    assert_same_state(load(tmp_path / "net", Net()), state(net))


def test_the_output_layer_of_a_language_model_is_named(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        if name != "lm_head":
            pack_randomly(model.get_submodule(name), W4)
    save(model, tmp_path / "llama", "gptq")
    config = quantization_config(tmp_path / "llama")
    assert not config["lm_head"] and "dynamic" not in config
    pack_randomly(model.lm_head, W4)
    save(model, tmp_path / "llama", "gptq")
    assert quantization_config(tmp_path / "llama")["lm_head"]


# what is refused


REFUSED = [
    ("gptq", nn.Linear(64, 33), W4, "'0' has 33 rows; gptq holds multiples of 32: skip this layer"),
    ("gptq_v2", nn.Linear(48, 64), replace(W4, group_size=16), "'0' has 48 columns; gptq_v2 holds"),
    ("gptq", nn.Linear(64, 64), replace(W4, bits=5), r"'0' has 5 bits; gptq holds \(2, 3, 4, 8\)"),
    ("gptq", nn.Linear(96, 64), replace(W4, group_size=48), "groups of 48 columns; gptq is read"),
    ("gptq", nn.Linear(64, 64), replace(W4, scale_dtype="float32"),
     r"'0' has float32 scales; gptq holds float16: quantize with QuantSpec\(scale_dtype="),
    ("gptq", nn.Conv2d(64, 64, 1), W4, "'0' is a Conv2d; gptq holds linear layers: use"),
    ("compressed-tensors", nn.ConvTranspose1d(64, 64, 1), W4,
     "'0' is a ConvTranspose1d; compressed-tensors holds nn.Linear: use format 'sapq'"),
    ("compressed-tensors", nn.Linear(64, 64).bfloat16(), replace(W4, scale_dtype="float32"),
     r"float32 scales that bfloat16, the dtype of .* QuantSpec\(scale_dtype=\"bfloat16\"\)"),
    ("compressed-tensors", nn.Linear(64, 64).double(), W4, "weight of torch.float64; compressed"),
    ("awq", nn.Linear(64, 64), W4, r"format must be one of \('sapq', 'gptq', 'gptq_v2', 'com"),
]  # fmt: skip


@pytest.mark.parametrize("format, module, spec, message", REFUSED)
def test_refuses_what_a_format_cannot_hold(
    tmp_path: Path, format: str, module: nn.Module, spec: QuantSpec, message: str
) -> None:
    model = nn.Sequential(module)
    pack_randomly(module, spec)
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "model", format)
    assert not list(tmp_path.iterdir())


def test_scales_of_bfloat16_in_gptq(tmp_path: Path) -> None:
    net = packed_net(replace(W4, scale_dtype="bfloat16"))
    save(net, tmp_path / "net", "gptq")
    loaded = load(tmp_path / "net", Net())
    torch.testing.assert_close(loaded.first.weight, net.first.weight, rtol=0, atol=0)
    net.second.scale[0, 0] = 1e-7
    with pytest.raises(ValueError, match=r"'second' has bfloat16 scales that float16, .* change"):
        save(net, tmp_path / "net", "gptq")
    assert_same_state(load(tmp_path / "net", Net()), state(loaded))


def test_zero_point_0_underflows_in_gptq_only(tmp_path: Path) -> None:
    net = packed_net(ASYMMETRIC)
    second = nn.Linear(ROWS, COLUMNS, bias=False).half()
    net.second = pack_randomly(second, ASYMMETRIC, lowest_zero=0)
    with pytest.raises(
        ValueError, match=r"'second' has a zero point of 0, .* use format 'gptq_v2'"
    ):
        save(net, tmp_path / "net", "gptq")
    for format in ("gptq_v2", "compressed-tensors", "sapq"):
        save(net, tmp_path / format, format)
        assert_same_state(load(tmp_path / format, Net()), state(net))


def test_refuses_conv1d_in_compressed_tensors(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(64, 64))
    pack_randomly(model[0], W4)
    with pytest.raises(ValueError, match=r"'0' is a Conv1D; .* use format 'gptq' or 'sapq'"):
        save(model, tmp_path / "model", "compressed-tensors")


def test_refuses_shared_codes_where_they_cannot_be_said(tmp_path: Path) -> None:
    net = packed_net(W4)
    net.twin = pack_randomly(nn.Linear(COLUMNS, ROWS).half(), W4)
    for buffer in ("qweight", "scale"):
        net.twin.register_buffer(buffer, getattr(net.first, buffer))
    with pytest.raises(ValueError, match="'twin' shares its weight with another layer"):
        save(net, tmp_path / "net", "gptq")


def test_refuses_renamed_tensors_of_transformers(tmp_path: Path) -> None:
    net = packed_net(W4)
    net._weight_conversions = ["a renaming"]
    with pytest.raises(ValueError, match="transformers renamed or merged tensors of this Net"):
        save(net, tmp_path / "net", "compressed-tensors")


def test_refuses_models_without_packed_layers_or_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no packed layer: quantize\(\.\.\., pack=True\)"):
        save(Net(), tmp_path / "net")
    net = packed_net(W4)
    net.head.to("meta")
    with pytest.raises(ValueError, match=r"'head\.weight' has no data \(meta device\)"):
        save(net, tmp_path / "net")
    net = packed_net(W4)
    net.register_buffer("phases", torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"'phases' is torch.complex128, which safetensors do"):
        save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_refuses_a_further_file_under_a_name_that_is_taken(tmp_path: Path) -> None:
    for name in ("config.json", "sapq.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name} would take the place of a file of the model"):
            save(packed_net(W4), tmp_path / "net", files=[tmp_path / name])
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("kind", [str, Path])
def test_refuses_one_path_where_several_are_expected(
    tmp_path: Path, kind: Callable[[Path], str | Path]
) -> None:
    (tmp_path / "tok.json").write_text("{}")
    with pytest.raises(ValueError, match=r"files must be an iterable of paths, got .*: pass "):
        save(packed_net(W4), tmp_path / "net", files=kind(tmp_path / "tok.json"))  # type: ignore[arg-type]
    assert not (tmp_path / "net").exists()


# reading what others wrote, and what is damaged


def refused_unchanged(folder: Path, message: str, model: nn.Module | None = None) -> None:
    """ValueError, and the model as it was."""
    model = model or Net()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load(folder, model)
    assert_same_state(model, before)


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    save(packed_net(ASYMMETRIC), tmp_path / "gptq", "gptq")
    return tmp_path / "gptq"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    save(packed_net(ASYMMETRIC), tmp_path / "packed", "compressed-tensors")
    return tmp_path / "packed"


def test_groups_in_the_order_of_activations(gptq: Path) -> None:
    edit_tensors(gptq, lambda t: t.update({"first.g_idx": t["first.g_idx"].flip(0)}))
    refused_unchanged(gptq, r"model\.safetensors: tensor 'first\.g_idx' is not i // group_size")
    edit_tensors(gptq, lambda t: t.pop("first.g_idx"))
    load(gptq, Net())
    edit_config(gptq, lambda config: config.update(desc_act=True))
    refused_unchanged(gptq, "'first' has desc_act, but no g_idx")


GPTQ_OPTIONS = [
    (dict(checkpoint_format="gptq_p"), r"format must be one of .* got 'gptq_p'"),
    (dict(quant_method="awq"), r"format must be one of .* got 'awq'"),
    (dict(pack_dtype="int64"), "pack_dtype must be 'int32', got 'int64'"),
    (dict(bits=9), "bits must be an integer from 2 to 8, got 9"),
    (dict(bits=8), r"tensor 'first\.qweight' must be \[16, 96\], got \[8, 96\]"),
    (dict(group_size=16), r"'first\.g_idx' is not i // group_size"),
    (dict(group_size=7), "group_size 7 does not divide 64 columns"),
    (dict(sym=True), r"'first\.qzeros' must hold 8 only"),
    (dict(dynamic={"-:^first$": {}}), "'first' is quantized, but '-:.first.' of dynamic excludes"),
    (dict(dynamic={"first": {"bits": 2}}), r"'first\.qweight' must be \[4, 96\], got \[8, 96\]"),
    (dict(dynamic={"first": None}), "gptq options are damaged: TypeError"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", GPTQ_OPTIONS)
def test_gptq_options_that_cannot_be_held(gptq: Path, options: Any, message: str) -> None:
    edit_config(gptq, lambda config: config.update(options))
    refused_unchanged(gptq, message)


def weights(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(options)


def group(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"].update(options)


PACKED_OPTIONS = [
    (weights(type="float"), r"'first' has type 'float'; only \('int',\) can be held"),
    (weights(strategy="tensor"), "'first' has strategy 'tensor'"),
    (weights(actorder="group"), "'first' has actorder 'group'"),
    (weights(dynamic=True), "'first' has dynamic True"),
    (weights(num_bits=5), r"'first\.weight_packed' must be \[96, 10\], got \[96, 8\]"),
    (weights(strategy="channel"), r"'first\.weight_zero_point' must be \[12, 1\], got \[12, 2\]"),
    (group(input_activations={"num_bits": 8}), r"quantizes activations \(input_activations\)"),
    (group(format="int-quantized"), "'first' has format 'int-quantized'; only 'pack-quantized'"),
    (group(targets=["re:.*k_proj"]), "'first' is packed, but no target of config_groups fits it"),
    (lambda c: c.update(config_groups={"W4A16": ["Linear"]}), "config_groups must be written out"),
    (lambda c: c.update(transform_config={"a": 1}), "transform_config must be empty"),
    (lambda c: c["config_groups"]["group_0"].pop("weights"), "options are damaged: KeyError"),
]


@pytest.mark.parametrize("change, message", PACKED_OPTIONS)
def test_compressed_tensors_options_that_cannot_be_held(
    packed: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_config(packed, change)
    refused_unchanged(packed, message)


def test_compressed_tensors_targets_by_name_pattern_and_class(packed: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        right = config["config_groups"]["group_0"]
        wrong = {**right, "weights": {**right["weights"], "num_bits": 8}}
        config["config_groups"] = {
            "class": {**wrong, "targets": ["Linear"]},
            "pattern": {**right, "targets": ["re:fir"]},
            "wrong pattern": {**wrong, "targets": ["re:s"]},
            "name": {**right, "targets": ["second"]},
        }

    edit_config(packed, change)
    load(packed, Net())


def test_legacy_group_index_of_compressed_tensors(packed: Path) -> None:
    index = torch.arange(COLUMNS, dtype=torch.int32) // 32
    edit_tensors(packed, lambda t: t.update({"first.weight_g_idx": index}))
    load(packed, Net())
    edit_tensors(packed, lambda t: t.update({"first.weight_g_idx": index.flip(0)}))
    refused_unchanged(packed, r"'first\.weight_g_idx' is not i // group_size")


Change = Callable[[dict[str, Tensor]], object]
DAMAGE: list[tuple[Change, str]] = [
    (lambda t: t.pop("first.scales"), r"'first\.scales' must be one of .* got nothing"),
    (lambda t: t.pop("first.qzeros"), r"tensor 'first\.qzeros' is missing"),
    (lambda t: t.pop("norm.weight"), r"tensor 'norm\.weight' of the model is missing"),
    (lambda t: t.update(more=torch.ones(1)), "tensor 'more' has no place in the model"),
    (lambda t: t.update({"second.bias": torch.ones(COLUMNS)}), r"'second\.bias' has no place"),
    (lambda t: t.update({"head.bias": torch.ones(6)}), r"'head\.bias' must be \[5\], got \[6\]"),
    (lambda t: t.update({"head.bias": torch.full((5,), 0.1)}),
     r"'head\.bias' is torch.float32, and torch.float16, as the model has it, would change it"),
    (lambda t: t.update({"first.qweight": t["first.qweight"].long()}),
     r"'first\.qweight' must be int32, got torch.int64"),
    (lambda t: t.update({"first.scales": t["first.scales"] / 0}), r"scales' holds NaN or Inf"),
    (lambda t: t.update({"first.qzeros": t["first.qzeros"] * 0 - 1}),
     r"'first\.qzeros' holds zero point 16; codes of 4 bits end at 15"),
    (lambda t: t.update({"first.qweight": t["first.qweight"].flatten()}),
     r"'first\.qweight' must have 2 axes, got \(768,\)"),
    (lambda t: t.update({"first.qweight": t["first.qweight"].T}),
     r"'first' is a Linear of \[8, 64\], in the model a Linear of \[96, 64\]"),
    (lambda t: t.update({f"other.{x}": t[f"first.{x}"].clone() for x in ("qweight", "scales")}),
     "'other' is not a layer of the model"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", DAMAGE)
def test_tensors_that_do_not_fit(gptq: Path, change: Change, message: str) -> None:
    edit_tensors(gptq, change)
    refused_unchanged(gptq, message)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_beyond_the_codes(tmp_path: Path, bits: int) -> None:
    """Of 8 bits they are beyond a byte too."""
    save(packed_net(replace(ASYMMETRIC, bits=bits)), tmp_path / "net", "gptq")
    edit_tensors(tmp_path / "net", lambda t: t.update({"first.qzeros": t["first.qzeros"] * 0 - 1}))
    message = rf"'first\.qzeros' holds zero point {2**bits}; codes of {bits} bits end at"
    refused_unchanged(tmp_path / "net", message)


def test_what_changes_nothing_is_accepted(gptq: Path) -> None:
    """A bias of zeros that early programs add, another dtype that holds the same values."""
    expected = state(load(gptq, Net()))
    edit_tensors(gptq, lambda t: t.update({"second.bias": torch.zeros(COLUMNS)}))
    edit_tensors(gptq, lambda t: t.update({"head.weight": t["head.weight"].float()}))
    assert_same_state(load(gptq, Net()), expected)


def test_older_programs_have_a_file_of_their_own_for_the_options(gptq: Path) -> None:
    expected = state(load(gptq, Net()))
    (gptq / "config.json").unlink()
    (gptq / "sapq.json").unlink()
    alone = json.loads((gptq / "quantize_config.json").read_text())
    for key in ("quant_method", "checkpoint_format", "pack_dtype", "dynamic", "lm_head", "meta"):
        del alone[key]
    (gptq / "quantize_config.json").write_text(json.dumps(alone))
    assert_same_state(load(gptq, Net()), expected)
    with pytest.raises(ValueError, match=r"has no config\.json: pass the model to load into"):
        load(gptq)


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, format: str) -> None:
    save(packed_net(W4), tmp_path / "net", format)
    path = tmp_path / "net" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    names = "|".join(load_file(path))
    refused_unchanged(
        tmp_path / "net",
        rf"model\.safetensors has changed since it was saved \(sha256\): tensor '({names})'$",
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_files(tmp_path: Path, format: str, kept: int) -> None:
    save(packed_net(W4), tmp_path / "net", format)
    path = tmp_path / "net" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused_unchanged(tmp_path / "net", r"net/model\.safetensors is damaged: ")


def test_changed_and_missing_files(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    save(packed_net(W4), folder, max_shard_size=4000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refused_unchanged(folder, f"{shard.name} is missing")
    shard.write_bytes(content)
    load(folder, Net())
    (folder / "config.json").write_text('{"quantization_config": {}}')
    refused_unchanged(folder, r"config\.json has changed since it was saved")
    (folder / "config.json").unlink()
    refused_unchanged(folder, r"config\.json is missing")


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    save(packed_net(W4), folder, "gptq", max_shard_size=4000)
    (folder / "sapq.json").unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))

    def with_map(weight_map: object) -> None:
        path.write_text(json.dumps({"weight_map": weight_map}))

    with_map({**index["weight_map"], "more": file})
    refused_unchanged(folder, "tensor 'more' of model.safetensors.index.json is missing")
    with_map({**index["weight_map"], name: "../other.safetensors"})
    refused_unchanged(folder, "must lie in a file of this folder, got '../other.safetensors'")
    with_map({key: value for key, value in index["weight_map"].items() if key != name})
    refused_unchanged(folder, f"does not list '{name}' there")
    with_map([])
    refused_unchanged(folder, "has no weight_map")
    path.write_text("{")
    refused_unchanged(folder, "cannot be read as JSON")


@pytest.mark.parametrize("format", FORMATS)
def test_a_loaded_model_does_not_follow_its_file(tmp_path: Path, format: str) -> None:
    net = packed_net(W4)
    save(net, tmp_path / "net", format)
    loaded = load(tmp_path / "net", Net())
    with open(tmp_path / "net" / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * (tmp_path / "net" / "model.safetensors").stat().st_size)
    assert_same_state(loaded, state(net))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    save(packed_net(W4), tmp_path / "net", "gptq")
    (tmp_path / "net" / "sapq.json").unlink()
    (tmp_path / "net" / "model.safetensors").rename(tmp_path / "net" / "pytorch_model.bin")
    refused_unchanged(tmp_path / "net", r"pytorch_model\.bin is not read, as unpickling can run")


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    save(packed_net(W4), folder)
    path = folder / "sapq.json"
    manifest = json.loads(path.read_text())

    def refused(message: str, **changes: Any) -> None:
        write_manifest(folder, {**manifest, **changes})
        refused_unchanged(folder, message)

    refused("has version 2; this program reads 1", version=2)
    refused("format must be one of", format="zip")
    refused("must list its files, got None", files=None)
    refused("must list its files, got", files={**manifest["files"], "more": 1})
    refused("must list files of this folder, got '../x'", files={"../x": "", **manifest["files"]})
    refused(r"config\.json has no checksum in sapq\.json", files={})
    refused(
        r"model\.safetensors has no checksum in sapq\.json",
        files={**manifest["files"], "model.safetensors": None},
    )
    refused("has no quantized layer", layers={})
    refused("sapq options are damaged: KeyError", layers={"first": {}})
    first = manifest["layers"]["first"]
    moved = {"first": {**first, "spec": {**first["spec"], "bits": 8}}}
    refused(r"'first\.qweight' must be \[96, 16\], got \[96, 8\]", layers=moved)
    refused("must be a number, got 'low'", layers={"first": {**first, "relative_error": "low"}})
    refused("'first' must have a kind, got 7", layers={"first": {**first, "kind": 7}})
    for changes in ({"rows": 95}, {"rows": "96"}, {"columns": 10**15}, {"shape": [-96, -64]}):
        refused("'first' cannot have a weight of", layers={"first": {**first, **changes}})
    huge = {"rows": 1, "columns": 10**15, "shape": [1, 10**15]}  # whose divisors nobody counts
    refused(r"'first\.qweight' must be \[1, ", layers={"first": {**first, **huge}})
    moved = {"first": {**first, "kind": "Conv1d"}}
    refused(r"'first' is a Conv1d of \[96, 64\], in the model a Linear of \[96, 64\]", layers=moved)
    path.write_text("[]")
    refused_unchanged(folder, r"sapq\.json must hold a JSON object, got list")
    path.unlink()
    refused_unchanged(folder, "format must be one of|has no quantized layer|damaged")


def test_a_change_of_the_manifest_is_found(tmp_path: Path) -> None:
    """Three bits in place of four fill the same words of so few columns."""
    model = nn.Sequential(nn.Linear(8, 32))
    pack_randomly(model[0], QuantSpec(3, symmetric=True))
    save(model, tmp_path / "net")
    path = tmp_path / "net" / "sapq.json"
    content = path.read_text()
    for old, new in (
        ('"bits": 3', '"bits": 4'), ('"format": "sapq"', '"format": "gptq"'), ('"sha256"', '"sha"'),
        ('"symmetric": true', '"symmetric": false'), ('"writer"', '"Writer"'),
    ):  # fmt: skip
        assert content.count(old) == 1
        path.write_text(content.replace(old, new))
        with pytest.raises(ValueError, match=r"sapq\.json has changed since it was saved"):
            load(tmp_path / "net", nn.Sequential(nn.Linear(8, 32)))
    path.write_text(json.dumps(json.loads(content), indent=4, sort_keys=True))
    load(tmp_path / "net", nn.Sequential(nn.Linear(8, 32)))


def test_bytes_of_one_element_whatever_its_strides() -> None:
    """Contiguous to PyTorch, but `view` as bytes fails: layers of one row and column have these."""
    for shape in ((1, 1), (1,), ()):
        row = torch.tensor([5, 7, 9], dtype=torch.int32)
        one = row.as_strided(shape, (3,) * len(shape), storage_offset=1)
        assert one.is_contiguous() and raw(one).tolist() == [7, 0, 0, 0]
    wide = torch.arange(6, dtype=torch.int16).view(2, 3).T
    assert raw(wide).tolist() == raw(wide.contiguous()).tolist()


def test_a_file_that_no_save_wrote_is_not_read(tmp_path: Path) -> None:
    save(llama_with_codes(), tmp_path / "net")
    (tmp_path / "net" / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"generation_config\.json has no checksum"):
        load(tmp_path / "net")


def test_json_that_no_parser_ends(gptq: Path) -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"quantization_config": ' + "[" * 100_000):
        (gptq / "config.json").write_text(text)
        (gptq / "sapq.json").unlink(missing_ok=True)
        refused_unchanged(gptq, r"config\.json cannot be read as JSON: maximum recursion depth")


@pytest.mark.parametrize("content", [[], "gptq", 1.5, None])
def test_a_configuration_that_is_no_object(gptq: Path, content: object) -> None:
    (gptq / "sapq.json").unlink()
    (gptq / "config.json").write_text(json.dumps({"quantization_config": content}))
    refused_unchanged(gptq, r"config\.json: quantization_config is no object")


def test_patterns_that_are_none(gptq: Path, packed: Path) -> None:
    edit_config(gptq, lambda config: config.update(dynamic={"+:(": {"bits": 4}}))
    refused_unchanged(gptq, r"options are damaged: .*missing \), unterminated")
    edit_config(packed, group(targets=["re:(", "Linear"]))
    refused_unchanged(packed, r"options are damaged: .*missing \), unterminated")


def test_shapes_that_no_file_of_this_size_holds(packed: Path) -> None:
    for shape in ([96, 2**62], [2**31, 64], [0, 64], [-96, -64]):
        edit_tensors(packed, lambda t, s=shape: t.update({"first.weight_shape": torch.tensor(s)}))
        refused_unchanged(packed, "'first' cannot have|'first.weight_packed' must be")


def test_a_group_index_without_an_axis(gptq: Path) -> None:
    edit_tensors(gptq, lambda tensors: tensors.update({"first.g_idx": torch.tensor(1)}))
    refused_unchanged(gptq, r"'first\.g_idx' must have 1 axis")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers, more than there are tensors"),
        ({"hidden_size": 2**20}, "weights, and the files hold"),
        ({"hidden_size": None}, "describes no model that transformers can build: .*hidden_size"),
        ({"hidden_act": "SILU"}, "describes no model that transformers can build: KeyError"),
    ],
)
def test_configurations_of_others(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(llama_with_codes(), tmp_path / "net", "gptq")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "net" / "sapq.json").unlink()
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "net")


def test_an_architecture_that_is_no_name(tmp_path: Path) -> None:
    """transformers 5.17 looks at types itself, and 5.23 does not."""
    transformers = pytest.importorskip("transformers")
    message = "names architecture"
    try:
        transformers.LlamaConfig(architectures=[[]])
    except Exception:  # of a class of huggingface_hub
        message = "describes no model that transformers can build"
    test_configurations_of_others(tmp_path, {"architectures": [[]]}, message)


def llama_with_codes() -> nn.Module:
    model = llama(num_hidden_layers=1)
    pack_randomly(model.model.layers[0].mlp.up_proj, W4)
    del model.generation_config
    return model


def test_models_that_do_not_fit(gptq: Path, tmp_path: Path) -> None:
    refused_unchanged(tmp_path / "none", "none is not a folder")
    (tmp_path / "plain").mkdir()
    refused_unchanged(tmp_path / "plain", "is not quantized: neither sapq.json nor")
    net = Net()
    net.first = nn.Linear(COLUMNS, ROWS + 32).half()
    refused_unchanged(gptq, r"'first' is a Linear of \[96, 64\], in the model a Linear of", net)
    net.first = nn.Identity()
    refused_unchanged(gptq, "'first' is a Identity in the model, which has no codes", net)
    net.first = type("Mine", (nn.Linear,), {})(COLUMNS, ROWS).half()
    refused_unchanged(gptq, "'first' cannot be packed: .*Mine may have a forward of its own", net)
    net.first = nn.Linear(COLUMNS, ROWS).half()
    net.first.scale = 0.5
    refused_unchanged(gptq, "'first' cannot be packed: its attribute 'scale' has a name", net)
    assert type(net.first) is nn.Linear
    net.first = nn.Linear(COLUMNS, ROWS, device="meta")
    with pytest.raises(ValueError, match=r"'first' has no data \(meta device\)"):
        load(gptq, net)
    net = Net()
    net.embedding = nn.Embedding(ROWS, COLUMNS)
    net.embedding.weight = net.first.weight
    refused_unchanged(gptq, "'first' is a Embedding in the model, which has no codes", net)
    loaded = load(gptq, Net())
    refused_unchanged(gptq, "'first' is packed already", loaded)


@pytest.mark.parametrize("format", FORMATS)
def test_codes_of_two_layers_in_a_model_that_ties_them(tmp_path: Path, format: str) -> None:
    def pair(tied: bool) -> nn.Sequential:
        model = nn.Sequential(*[nn.Linear(COLUMNS, COLUMNS).half() for _ in range(2)])
        if tied:
            model[1].weight = model[0].weight
        return model

    model = pair(False)
    for module in model:
        pack_randomly(module, ASYMMETRIC)
    save(model, tmp_path / "net", format)
    tied = pair(True)
    message = "'0' and '1' share one weight in the model, and hold different codes"
    refused_unchanged(tmp_path / "net", message, tied)
    assert type(tied[0]) is nn.Linear and tied[0].weight is tied[1].weight
    for name in ("qweight", "scale", "qzeros"):
        model[1].get_buffer(name).copy_(model[0].get_buffer(name))
    save(model, tmp_path / "net", format)
    load(tmp_path / "net", tied)
    assert_same_state(tied, state(model))
    assert tied[0].qweight is tied[1].qweight


def test_a_twin_in_two_places(tmp_path: Path) -> None:
    def twins() -> nn.Sequential:
        first, second = (nn.Linear(COLUMNS, COLUMNS) for _ in range(2))
        second.weight = first.weight
        return nn.Sequential(first, second, second)

    model = twins()
    quantize(model, [torch.randn(9, COLUMNS)], QuantSpec(4), pack=True, progress=False)
    save(model, tmp_path / "net")
    assert_same_state(load(tmp_path / "net", twins()), state(model))


def test_architectures_that_transformers_does_not_have(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    pack_randomly(model.model.layers[0].mlp.up_proj, W4)
    save(model, tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    for name in ("NoSuchModel", "logging"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "architectures": [name]}))
        manifest = json.loads((tmp_path / "llama" / "sapq.json").read_text())
        manifest["files"]["config.json"] = sha256(path)
        write_manifest(tmp_path / "llama", manifest)
        with pytest.raises(ValueError, match=f"names architecture '{name}', which transformers"):
            load(tmp_path / "llama")
