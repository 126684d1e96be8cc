"""A small image classifier of residual units: three kinds of shortcut, and attention over channels.

He et al., 2015, https://arxiv.org/abs/1512.03385; Hu et al., 2018, https://arxiv.org/abs/1709.01507.
"""

import torch.nn.functional as F
from torch import nn


class ZeroPadded(nn.Module):
    """Option A: every second pixel, and zeros for the channels that are new."""

    def __init__(self, old, new, stride):
        super().__init__()
        self.more, self.stride = new - old, stride

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class Projected(nn.Sequential):
    """A convolution of width 1."""

    def __init__(self, old, new, stride):
        super().__init__(nn.Conv2d(old, new, 1, stride, bias=False), nn.BatchNorm2d(new))


def shortcut(option, old, new, stride):
    """Option A pads with zeros, B projects where the shape changes, C projects always."""
    if option == "C" or (option == "B" and (old, stride) != (new, 1)):
        return Projected(old, new, stride)
    return nn.Identity() if (old, stride) == (new, 1) else ZeroPadded(old, new, stride)


class SqueezeExcite(nn.Module):
    """Channel attention: the mean of each channel decides how much of every channel passes."""

    def __init__(self, channels, reduction=4):
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x):
        B, C, _, _ = x.shape
        return x * self.excite(self.squeeze(x).view(B, C)).view(B, C, 1, 1)


class Residual(nn.Module):
    """Two convolutions, channel attention, and the shortcut around them."""

    def __init__(self, old, new, stride, option):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(old, new, 3, stride, 1, bias=False),
            nn.Conv2d(new, new, 3, 1, 1, bias=False),
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(new), nn.BatchNorm2d(new)])
        self.attention = SqueezeExcite(new)
        self.shortcut = shortcut(option, old, new, stride)

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)))
        y = self.attention(self.norms[1](self.second(y)))
        return F.relu(y + self.shortcut(x))


class Classifier(nn.Module):
    """pixels (B, 3, H, W) -> logits (B, classes), whatever the height and width are."""

    def __init__(self, option="B", classes=10, width=16):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        widths = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2)]
        self.units = nn.Sequential(*(Residual(old, new, stride, option) for old, new, stride in widths))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, pixels):
        return self.head(self.units(self.stem(pixels)).mean(dim=(2, 3)))
