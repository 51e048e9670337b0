"""compressed-tensors itself reads what we write, and we read what it writes, to the bit."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapq_triton import QuantSpec, load, save
from tests.tiny import COLUMNS, ROWS, Net, llama, pack_randomly, packed_net

pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")

NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
SPECS = [
    pytest.param(bits, group, symmetric, dtype, id=f"{bits}-{group}-{symmetric}-{NAMES[dtype]}")
    for bits in range(2, 9)
    for group, symmetric, dtype in (
        (32, True, torch.float16), (16, False, torch.bfloat16), (-1, False, torch.float32),
    )
]  # fmt: skip


def scheme_of(folder: Path, name: str) -> tuple[Any, dict[str, Tensor]]:
    """What compressed-tensors makes of the configuration, and its tensors of a layer."""
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    tensors = load_file(folder / "model.safetensors")
    prefix = f"{name}."
    return group, {
        key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)
    }


@pytest.mark.parametrize("bits, group, symmetric, dtype", SPECS)
def test_it_unpacks_our_weights(
    tmp_path: Path, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor

    net = packed_net(
        QuantSpec(bits, group, symmetric, scale_dtype=NAMES[dtype]), dtype=dtype  # type: ignore[arg-type]
    )  # fmt: skip
    save(net, tmp_path / "net", "compressed-tensors")
    scheme, tensors = scheme_of(tmp_path / "net", "first")
    weight = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert weight.dtype == dtype
    torch.testing.assert_close(weight, net.first.weight, rtol=0, atol=0)


@pytest.mark.parametrize("bits, group, symmetric, dtype", SPECS)
def test_we_read_what_it_packs(
    tmp_path: Path, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor

    net = packed_net(
        QuantSpec(bits, group, symmetric, scale_dtype=NAMES[dtype]), dtype=dtype  # type: ignore[arg-type]
    )  # fmt: skip
    save(net, tmp_path / "net", "compressed-tensors")
    scheme, _ = scheme_of(tmp_path / "net", "first")
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    zero = (net.first.zero_points().int() - 2 ** (bits - 1)).to(torch.int8)
    # another weight than ours: theirs is rounded anew, on the grid of ours
    plain = {"weight": torch.randn(ROWS, COLUMNS, dtype=dtype), "weight_scale": net.first.scale}
    if not symmetric:
        plain["weight_zero_point"] = zero
    packed = PackedQuantizationCompressor.compress(plain, scheme)
    tensors |= {f"first.{name}": x for name, x in packed.items()}
    save_file(tensors, tmp_path / "net" / "model.safetensors")
    (tmp_path / "net" / "sapq.json").unlink()
    theirs = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    ours: Any = load(tmp_path / "net", Net(dtype))
    torch.testing.assert_close(ours.first.weight, theirs, rtol=0, atol=0)


@pytest.mark.skipif(version("compressed-tensors") < "0.20", reason="writes more nulls")
def test_our_configuration_is_the_one_it_would_write(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    other = QuantSpec(8, -1, False, scale_dtype="float16")
    for second in (None, other):
        save(
            packed_net(QuantSpec(4, 32, True, scale_dtype="float16"), second),
            tmp_path / "net",
            "compressed-tensors",
        )
        ours = json.loads((tmp_path / "net" / "config.json").read_text())["quantization_config"]
        theirs = QuantizationConfig.model_validate(ours).model_dump(mode="json")
        added = {"version": "0.20.0", "sparsity_config": {}, "transform_config": {}}
        assert ours == {**theirs, **added}


@pytest.mark.filterwarnings("default")  # of the two packages
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["one grid", "two grids", "asymmetric"])
def test_transformers_computes_our_logits(tmp_path: Path, dtype: torch.dtype, case: str) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = llama(dtype, attention_bias=True, tie_word_embeddings=case == "two grids")
    grid = QuantSpec(4, 32, case != "asymmetric", scale_dtype=NAMES[dtype])  # type: ignore[arg-type]
    other = replace(grid, bits=8, group_size=-1) if case == "two grids" else grid
    left = ["lm_head", "model.layers.0.mlp.up_proj"]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in left:
            pack_randomly(module, other if "down_proj" in name else grid)
    save(model, tmp_path / "llama", "compressed-tensors")
    # left packed, compressed-tensors 0.20 has no place for packed zero points, whoever wrote them
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama", **(how if case == "asymmetric" else {})
    )
    layer = theirs.model.layers[0]
    assert hasattr(layer.self_attn.q_proj, "weight_packed") == (case != "asymmetric")
    assert not hasattr(layer.mlp.up_proj, "weight_packed")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.isfinite().all()
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(
        layer.mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight, rtol=0, atol=0
    )
