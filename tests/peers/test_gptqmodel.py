"""GPTQModel itself reads what we write, and we read what it packs; where it is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapq_triton import QuantSpec, load, save
from tests.tiny import COLUMNS, ROWS, Net, llama, pack_randomly, packed_net, save_tokenizer

pytestmark = [
    pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed"),
    pytest.mark.filterwarnings("default"),  # of the package and what it brings along
]

GRIDS = [
    pytest.param(format, QuantSpec(bits, group, symmetric, scale_dtype="float16"),
                 id=f"{format}-{bits}-{group}-{symmetric}")
    for format in ("gptq", "gptq_v2")
    for bits in (2, 3, 4, 8)
    for group, symmetric in ((32, True), (16, False), (-1, False))
]  # fmt: skip


def torch_linear(format: str, spec: QuantSpec, columns: int, rows: int, bias: bool) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(
        bits=spec.bits, group_size=spec.group_size, sym=spec.symmetric, desc_act=False,
        in_features=columns, out_features=rows, bias=bias, format=format,
    )  # fmt: skip


def their_weight(layer: Any, format: str) -> Tensor:
    """[R, C] as it dequantizes, after the conversion to version 2 that is a part of loading."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    if format == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits=layer.bits, pack_dtype=layer.pack_dtype)
    layer.eval()
    weight: Tensor = type(layer).dequantize_weight(layer)
    return weight.T


@pytest.mark.parametrize("format, spec", GRIDS)
def test_it_unpacks_our_weights(tmp_path: Path, format: str, spec: QuantSpec) -> None:
    net = packed_net(spec)
    save(net, tmp_path / "net", format)
    layer = torch_linear(format, spec, COLUMNS, ROWS, bias=True)
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    named = {k.removeprefix("first."): x for k, x in tensors.items() if k.startswith("first.")}
    layer.load_state_dict(named, strict=True)
    weight = their_weight(layer, format)
    assert weight.dtype == torch.float16
    torch.testing.assert_close(weight, net.first.weight, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [grid.values[1] for grid in GRIDS if grid.values[0] == "gptq_v2"])
def test_we_read_what_it_packs(tmp_path: Path, spec: QuantSpec) -> None:
    net = packed_net(spec)
    save(net, tmp_path / "net", "gptq_v2")
    layer = torch_linear("gptq_v2", spec, COLUMNS, ROWS, bias=True)
    plain = nn.Linear(COLUMNS, ROWS)
    with torch.no_grad():
        plain.weight.copy_(net.first.weight)
    groups = net.first.scale.shape[1]
    layer.pack_block(
        linear=plain,
        scales=net.first.scale.float(),
        zeros=net.first.zero_points().float(),
        g_idx=torch.arange(COLUMNS, dtype=torch.int32) // (COLUMNS // groups),
    )
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    tensors |= {f"first.{name}": x.contiguous() for name, x in layer.state_dict().items()}
    save_file(tensors, tmp_path / "net" / "model.safetensors")
    (tmp_path / "net" / "sapq.json").unlink()
    ours: Any = load(tmp_path / "net", Net())
    torch.testing.assert_close(ours.first.weight, net.first.weight, rtol=0, atol=0)
    torch.testing.assert_close(ours.first.bias, plain.bias.half(), rtol=0, atol=0)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_it_loads_our_folder(tmp_path: Path, format: str, dtype: torch.dtype, mixed: bool) -> None:
    from gptqmodel import BACKEND, GPTQModel

    model = llama(dtype, attention_bias=True)
    scale_dtype: Any = str(dtype).removeprefix("torch.")
    four = QuantSpec(4, 32, True, scale_dtype=scale_dtype)
    eight = QuantSpec(8, -1, False, scale_dtype=scale_dtype)
    left = ["lm_head", *(["model.layers.0.mlp.up_proj"] if mixed else [])]
    names = [name for name, x in model.named_modules() if type(x) is nn.Linear and name not in left]
    for name in names:
        spec = eight if mixed and "down_proj" in name else four
        pack_randomly(model.get_submodule(name), spec)
    save_tokenizer(tmp_path)
    save(model, tmp_path / "llama", format, files=tmp_path.glob("tokenizer*"))
    theirs = GPTQModel.load(
        str(tmp_path / "llama"), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=dtype
    ).model
    for name in names:
        layer = theirs.get_submodule(name)
        weight = type(layer).dequantize_weight(layer).T
        ours = model.get_submodule(name)
        torch.testing.assert_close(weight, ours.weight, rtol=0, atol=0)
        if ours.bias is not None:
            torch.testing.assert_close(layer.bias.to(dtype), ours.bias, rtol=0, atol=0)
    if mixed:
        assert type(theirs.model.layers[0].mlp.up_proj) is nn.Linear
    ids = torch.arange(24)[None]
    with torch.no_grad():
        actual, expected = theirs(ids).logits.float(), model(ids).logits.float()
    assert expected.norm() > 1
    assert (actual - expected).norm() < torch.finfo(dtype).eps * 8 * expected.norm()
