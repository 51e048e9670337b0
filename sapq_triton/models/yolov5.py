"""YOLOv5 (release 6 and later) with the parameter names of Ultralytics' checkpoints.

Only the inference graph: images in, decoded boxes out, no loss and no non-maximum suppression.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

_STRIDES = (8, 16, 32)
# Three anchors (width, height in pixels) at each stride, published with the COCO models.
_COCO_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
# Layers that read more than the previous output (-1): four concatenations and the detection head.
_SOURCES = {12: (-1, 6), 16: (-1, 4), 19: (-1, 14), 22: (-1, 10), 24: (17, 20, 23)}
_REUSED = {source for sources in _SOURCES.values() for source in sources} - {-1}


class ConvBlock(nn.Module):
    """Convolution without bias, BatchNorm, SiLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride]."""
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution of the same width, with or without a shortcut."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = ConvBlock(channels, channels)
        self.cv2 = ConvBlock(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels, H, W] -> the same shape."""
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """Cross-stage partial block: ``cv3(cat(bottlenecks(cv1(x)), cv2(x)))``."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, shortcut: bool = True
    ) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.cv1 = ConvBlock(in_channels, hidden)
        self.cv2 = ConvBlock(in_channels, hidden)
        self.cv3 = ConvBlock(2 * hidden, out_channels)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W] -> [N, out_channels, H, W]."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: maxima over 5, 9 and 13 pixels by repeating one 5x5 pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = ConvBlock(in_channels, hidden)
        self.cv2 = ConvBlock(4 * hidden, out_channels)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W] -> [N, out_channels, H, W]."""
        maxima = [self.cv1(x)]
        for _ in range(3):
            maxima.append(self.m(maxima[-1]))
        return self.cv2(torch.cat(maxima, dim=1))


class Concat(nn.Module):
    """Concatenation over channels, a module only so that the later layers keep their numbers."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features, each [N, C_i, H, W] -> [N, sum of C_i, H, W]."""
        return torch.cat(tuple(features), dim=1)


class Detect(nn.Module):
    """Detection head: a 1x1 convolution for each stride, then decoding to pixels."""

    anchors: Tensor

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.num_outputs = 5 + num_classes
        # [stride, anchor, (width, height)] in units of the stride, as checkpoints store them
        strides = torch.tensor(_STRIDES, dtype=torch.float32)
        self.register_buffer("anchors", torch.tensor(_COCO_ANCHORS) / strides[:, None, None])
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * self.num_outputs, 1) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features, for each stride [N, C_i, H / stride, W / stride] -> [N, boxes, 5 + classes]."""
        raw = [conv(feature) for conv, feature in zip(self.m, features, strict=True)]
        return torch.cat([self._decode(x, level) for level, x in enumerate(raw)], dim=1)

    def _decode(self, raw: Tensor, level: int) -> Tensor:
        """raw [N, 3 * (5 + classes), H, W] -> [N, 3 * H * W, 5 + classes], anchor-major."""
        stride = _STRIDES[level]
        x = raw.unflatten(1, (3, self.num_outputs)).permute(0, 1, 3, 4, 2).sigmoid()
        xy, wh, scores = x.split((2, 2, self.num_outputs - 4), dim=-1)
        xy = (2 * xy - 0.5 + _cells(raw)) * stride
        wh = (2 * wh) ** 2 * (self.anchors[level] * stride).view(3, 1, 1, 2)
        return torch.cat((xy, wh, scores), dim=-1).flatten(1, 3)


class YOLOv5(nn.Module):
    """YOLOv5 detector: 60 convolutions at ``depth`` 1/3.

    ``width`` scales channels and ``depth`` the bottlenecks of each C3: n (0.25, 0.33), s (0.5,
    0.33), m (0.75, 0.67), l (1, 1).
    """

    def __init__(self, width: float, depth: float, num_classes: int = 80) -> None:
        super().__init__()
        p1, p2, p3, p4, p5 = (math.ceil(c * width / 8) * 8 for c in (64, 128, 256, 512, 1024))
        n3, n6, n9 = (max(round(n * depth), 1) for n in (3, 6, 9))
        self.model = nn.ModuleList(
            [
                ConvBlock(3, p1, 6, 2, padding=2),  # stride 2
                ConvBlock(p1, p2, 3, 2),
                C3(p2, p2, n3),
                ConvBlock(p2, p3, 3, 2),
                C3(p3, p3, n6),  # 4: stride 8
                ConvBlock(p3, p4, 3, 2),
                C3(p4, p4, n9),  # 6: stride 16
                ConvBlock(p4, p5, 3, 2),
                C3(p5, p5, n3),
                SPPF(p5, p5),
                ConvBlock(p5, p4),  # 10: stride 32
                nn.Upsample(scale_factor=2, mode="nearest"),
                Concat(),
                C3(p5, p4, n3, shortcut=False),
                ConvBlock(p4, p3),  # 14: stride 16
                nn.Upsample(scale_factor=2, mode="nearest"),
                Concat(),
                C3(p4, p3, n3, shortcut=False),  # 17: to the head, stride 8
                ConvBlock(p3, p3, 3, 2),
                Concat(),
                C3(p4, p4, n3, shortcut=False),  # 20: to the head, stride 16
                ConvBlock(p4, p4, 3, 2),
                Concat(),
                C3(p5, p5, n3, shortcut=False),  # 23: to the head, stride 32
                Detect((p3, p4, p5), num_classes),
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] in [0, 1], H and W multiples of 32 -> [N, boxes, 5 + classes].

        A box is centre x, centre y, width, height in pixels, objectness, class scores, the last
        two after the sigmoid; strides, anchors, rows and columns of cells follow in this order.
        """
        x = images
        kept: dict[int, Tensor] = {}
        for index, layer in enumerate(self.model):
            sources = _SOURCES.get(index)
            if sources is None:
                x = layer(x)
            else:
                x = layer([x if source == -1 else kept[source] for source in sources])
            if index in _REUSED:
                kept[index] = x
        return x


def _cells(raw: Tensor) -> Tensor:
    """Column and row of every cell of raw [N, K, H, W], as [H, W, 2]."""
    rows, columns = (torch.arange(n, device=raw.device, dtype=raw.dtype) for n in raw.shape[-2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1)


def yolov5n(num_classes: int = 80) -> YOLOv5:
    """Build YOLOv5n with random weights, in eval mode."""
    return YOLOv5(width=0.25, depth=0.33, num_classes=num_classes).eval()


def yolov5s(num_classes: int = 80) -> YOLOv5:
    """Build YOLOv5s with random weights, in eval mode."""
    return YOLOv5(width=0.5, depth=0.33, num_classes=num_classes).eval()


def fuse_batchnorm(model: YOLOv5) -> YOLOv5:
    """Fold every BatchNorm's running statistics into its convolution, in place; return ``model``.

    Each ``bn`` becomes an Identity and each ``conv`` gains a bias. Fused blocks are left alone.
    """
    for block in model.modules():
        if isinstance(block, ConvBlock) and isinstance(block.bn, nn.BatchNorm2d):
            conv, bn = block.conv, block.bn
            assert bn.running_mean is not None and bn.running_var is not None  # for mypy
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            block.bn = nn.Identity()
    return model


def load_yolov5_onnx(
    path: str | Path, width: float = 0.25, depth: float = 0.33, num_classes: int = 80
) -> YOLOv5:
    """Load Ultralytics' ONNX export, BatchNorm already folded, as a fused float32 model in eval.

    Weights are found by initializer name. The export stores its anchors as unnamed constants, so
    those of COCO are kept.
    """
    model = fuse_batchnorm(YOLOv5(width, depth, num_classes).eval())
    initializers = _onnx_initializers(path)
    missing = [name for name, _ in model.named_parameters() if name not in initializers]
    if missing:
        raise ValueError(
            f"{path} is not a YOLOv5 export with folded BatchNorm at depth {depth}: "
            f"{len(missing)} initializers are missing, first {missing[0]!r}"
        )
    own = model.state_dict()
    model.load_state_dict({name: initializers.get(name, own[name]) for name in own})
    return model


def _onnx_initializers(path: str | Path) -> dict[str, Tensor]:
    try:
        import onnx
    except ImportError as error:
        raise ImportError("reading an ONNX file needs onnx: pip install onnx") from error
    return {
        tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)).float()
        for tensor in onnx.load(str(path)).graph.initializer
    }
