"""The Inception network of FID, P-IDS and U-IDS: features of images.

This is Inception V3 as it was published in TensorFlow on 2015-12-05, with the weights under
torchvision's names (Seitzer's conversion). It differs from torchvision's network in four ways: its
average pooling leaves out the padding, its last block has max pooling, images are scaled to 299
pixels as TensorFlow 1 does, and colours become (x - 128) / 128. Features are the means of the last
maps. FID is defined by exactly these weights, so no other network is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dpnet.evaluation.exact import exact_convolutions
from dpnet.evaluation.tensor_file import read_tensors
from dpnet.evaluation.weights import WeightsFile

SIDE = 299  # pixels that an image is scaled to
FEATURES = 2048
_CLASSES = 1008  # of the published network; torchvision's own has 1000
_ADVICE = (
    "name pt_inception-2015-12-05-6726825d.pth, as pytorch-fid and torch-fidelity publish it, in"
    " evaluate.inception_weights, or leave the option out."
)


class _Conv(nn.Module):
    """A convolution without bias, batch normalization and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = F.relu(self.bn(self.conv(x)))
        return found


def _square(x: Tensor) -> Tensor:
    """Return the means of 3 x 3 pixels. Beyond the border there are none, so they do not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


_ROW, _COLUMN = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))  # kernel, stride and padding


class _A(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1 = _Conv(inputs, 48)
        self.branch5x5_2 = _Conv(48, 64, 5, 1, 2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, 1, 1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 1, 1)
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_square(x))], 1)


class _B(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, 2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, 1, 1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    def __init__(self, inputs: int, middle: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192)
        self.branch7x7_1 = _Conv(inputs, middle)
        self.branch7x7_2 = _Conv(middle, middle, *_ROW)
        self.branch7x7_3 = _Conv(middle, 192, *_COLUMN)
        self.branch7x7dbl_1 = _Conv(inputs, middle)
        self.branch7x7dbl_2 = _Conv(middle, middle, *_COLUMN)
        self.branch7x7dbl_3 = _Conv(middle, middle, *_ROW)
        self.branch7x7dbl_4 = _Conv(middle, middle, *_COLUMN)
        self.branch7x7dbl_5 = _Conv(middle, 192, *_ROW)
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_square(x))], 1)


class _D(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192)
        self.branch3x3_2 = _Conv(192, 320, 3, 2)
        self.branch7x7x3_1 = _Conv(inputs, 192)
        self.branch7x7x3_2 = _Conv(192, 192, *_ROW)
        self.branch7x7x3_3 = _Conv(192, 192, *_COLUMN)
        self.branch7x7x3_4 = _Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class _E(nn.Module):
    def __init__(self, inputs: int, *, largest: bool) -> None:
        super().__init__()
        self.largest = largest  # whether it pools the largest value, not the mean
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1 = _Conv(inputs, 384)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), 1, (0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), 1, (1, 0))
        self.branch3x3dbl_1 = _Conv(inputs, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, 1, 1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), 1, (0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), 1, (1, 0))
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else _square(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """The feature network, in float32 and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _A(192, 32)
        self.Mixed_5c = _A(256, 64)
        self.Mixed_5d = _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b = _C(768, 128)
        self.Mixed_6c = _C(768, 160)
        self.Mixed_6d = _C(768, 160)
        self.Mixed_6e = _C(768, 192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b = _E(1280, largest=False)
        self.Mixed_7c = _E(2048, largest=True)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: float32 [N, 3, H, W] with values from 0 to 255.

        Returns:
            float32 [N, FEATURES].
        """
        x = (scale_as_tensorflow(images, SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        means: Tensor = x.mean((2, 3))
        return means

    @torch.no_grad()
    def features(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return the features of uint8 images [H, W, 3] of one size: float32 [N, FEATURES].

        One call holds all images of a pair, so the results do not depend on other pairs.
        """
        device = self.Conv2d_1a_3x3.conv.weight.device
        pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float()
        with exact_convolutions(device):
            found: NDArray[np.float32] = self(pixels).cpu().numpy()
        return found


def scale_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Scale images [N, C, H, W] to a square by the bilinear filter of TensorFlow 1.

    The value at the output's place i is taken from the input's place i * H / side: corners are not
    aligned, and pixels have no half. torch's own filter has half pixels, so its features differ.
    """
    for axis in (3, 2):
        size = images.shape[axis]
        at = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        low = at.long()
        share = (at - low).reshape(-1, *[1] * (3 - axis))
        first = images.index_select(axis, low)
        second = images.index_select(axis, (low + 1).clamp_max(size - 1))
        images = first + (second - first) * share
    return images


def load_inception(file: WeightsFile) -> Inception:
    """Read the network's weights from a .pth or .safetensors file.

    Raises:
        ConfigError: the file is cut short, or holds anything else.
        PipelineError: the file was changed.
    """
    network = "the FID Inception network"
    found = read_tensors(file, "Inception", network, _ADVICE)
    found.take("fc.weight", (_CLASSES, FEATURES))  # torchvision's own network has another one
    made = Inception()
    wanted = {
        name: found.take(name, tuple(tensor.shape))
        for name, tensor in made.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    made.load_state_dict(wanted, strict=False)
    return made.eval()
