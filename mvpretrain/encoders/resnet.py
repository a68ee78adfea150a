"""ResNets with the stem for small images, as contrastive papers use them on CIFAR."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from mvpretrain.encoders import EncoderConfig, _layers, check_items
from mvpretrain.types import View


class ResNetConfig(EncoderConfig):
    """`depth` 18, 34 or 50. `norm: batch` is that of the papers, with statistics of one rank's rows; see kind `conv`
    for why one may want `group`. ResNets with the large stem are among the models of kind `timm`."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50] = 18
    channels: PositiveInt = 3
    norm: Literal["batch", "group"] = "batch"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"norm": "group"}]

    def example_view(self, rows: int) -> View:
        return View(torch.randn(rows, self.channels, 16, 16))

    def build(self) -> ResNet:
        return ResNet(self)


class ResNet(nn.Module):
    """torchvision's ResNet whose stem is one 3 x 3 convolution of stride 1, without max-pooling (Chen et al. 2020,
    B.9): `b c h w` to `b 512` (depth 50: `b 2048`). ValueError: other channels.

    With batch norm, recomputed activations move its running averages twice a step.
    """

    def __init__(self, config: ResNetConfig):
        from torchvision import models

        super().__init__()
        norm = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 32)
        self.model = getattr(models, f"resnet{config.depth}")(weights=None, norm_layer=norm)
        self.channels, self.dim = config.channels, self.model.fc.in_features
        self.model.conv1 = nn.Conv2d(config.channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.model.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.model.maxpool, self.model.fc = nn.Identity(), nn.Identity()

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.layer1, *self.model.layer2, *self.model.layer3, *self.model.layer4]

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        check_items(view.data, (self.channels, None, None), "resnet", "set its channels to those of the image")
        return self.model(view.data.to(self.model.conv1.weight.dtype)).float()

    def checkpoint_activations(self) -> None:
        _layers.checkpoint_activations(self.blocks)
