"""Models that read images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.base import Architecture, Specimen, images, last_hidden, logits, settled

__all__ = ["ALL"]

CLASSES = 40


def _classifier(model: nn.Module, size: int, count: int = 4) -> Specimen:
    batch = images(size, count)
    return Specimen(settled(model, batch), batch, lambda output: output)


def _resnet() -> Specimen:
    from torchvision.models.resnet import BasicBlock, ResNet

    return _classifier(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 64)


def _mobilenet_v3() -> Specimen:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 72, 24, False, "RE", 2, 1, 1.0),
        InvertedResidualConfig(24, 5, 96, 40, True, "HS", 1, 1, 1.0),
        InvertedResidualConfig(40, 5, 120, 40, True, "HS", 1, 1, 1.0),
    ]
    return _classifier(MobileNetV3(blocks, last_channel=256, num_classes=CLASSES), 64)


def _efficientnet() -> Specimen:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [
        MBConvConfig(1, 3, 1, 32, 16, 1),
        MBConvConfig(6, 3, 2, 16, 24, 1),
        MBConvConfig(6, 5, 2, 24, 40, 2),
    ]
    return _classifier(EfficientNet(blocks, dropout=0.2, last_channel=256, num_classes=CLASSES), 64)


def _densenet() -> Specimen:
    from torchvision.models import DenseNet

    return _classifier(DenseNet(growth_rate=16, block_config=(2, 3, 2), num_init_features=32, num_classes=CLASSES), 64)


def _shufflenet() -> Specimen:
    from torchvision.models import shufflenet_v2_x0_5

    return _classifier(shufflenet_v2_x0_5(weights=None, num_classes=CLASSES), 64)


def _video_resnet() -> Specimen:
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    def batch(number: int) -> Tensor:
        return torch.stack(
            [images(32, 2)(8 * number + frame) for frame in range(8)], 2
        )  # (count, 3, frames, size, size)

    model = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=CLASSES)
    return Specimen(settled(model, batch), batch, lambda output: output)


def _convnext() -> Specimen:
    from timm.models.convnext import ConvNeXt

    model = ConvNeXt(num_classes=CLASSES, depths=(1, 1, 2, 1), dims=(40, 80, 160, 320), ls_init_value=1.0)
    return _classifier(model, 64)


def _vit() -> Specimen:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=64, patch_size=8, num_classes=CLASSES, embed_dim=128, depth=3, num_heads=4)
    return _classifier(model, 64)


def _mixer() -> Specimen:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(num_classes=CLASSES, img_size=64, patch_size=8, num_blocks=3, embed_dim=128)
    nn.init.normal_(model.head.weight, std=0.1)  # its own initial weights are zeros
    return _classifier(model, 64)


def _swin() -> Specimen:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=64,
        patch_size=2,
        window_size=8,
        num_classes=CLASSES,
        embed_dim=48,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
    )
    return _classifier(model, 64)


def _detr() -> Specimen:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", out_features=["stage3"]
    )
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        num_queries=20,
    )
    batch = images(96, 2)
    return Specimen(settled(DetrForObjectDetection(config), batch), batch, logits)


def _segformer() -> Specimen:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=64
    )
    batch = images(96, 2)
    model = settled(SegformerForSemanticSegmentation(config), batch)
    return Specimen(model, batch, lambda output: output.logits.movedim(1, -1))


class UNet(nn.Module):
    """Convolutions down, transposed convolutions up, what went down read again beside them."""

    def __init__(self, width: int = 16, depth: int = 3, classes: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.first = self._double(3, width)
        self.down = nn.ModuleList(map(self._double, widths, widths[1:]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, w // 2, 2, stride=2) for w in widths[:0:-1])
        self.merged = nn.ModuleList(self._double(w, w // 2) for w in widths[:0:-1])
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(read: int, made: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (read, made):
            layers += [nn.Conv2d(channels, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of each pixel, (count, classes, height, width)."""
        passed = [self.first(x)]
        for down in self.down:
            passed.append(down(self.pool(passed[-1])))
        x = passed.pop()
        for up, merged in zip(self.up, self.merged, strict=True):
            x = merged(torch.cat([passed.pop(), up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


def _unet() -> Specimen:
    batch = images(64, 4)
    return Specimen(settled(UNet(), batch), batch, lambda output: output.movedim(1, -1))


def _clip() -> Specimen:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=8
    )
    return Specimen(CLIPVisionModel(config).eval(), images(64), last_hidden)


ALL = (
    Architecture("ResNet", "torchvision", _resnet),
    Architecture("MobileNetV3", "torchvision", _mobilenet_v3),
    Architecture("EfficientNet", "torchvision", _efficientnet),
    Architecture("DenseNet", "torchvision", _densenet),
    Architecture("ShuffleNetV2", "torchvision", _shufflenet),
    Architecture("R3D, video", "torchvision", _video_resnet),
    Architecture("ConvNeXt", "timm", _convnext),
    Architecture("ViT", "timm", _vit),
    Architecture("Swin", "timm", _swin),
    Architecture("MLP-Mixer", "timm", _mixer),
    Architecture("DETR", "transformers", _detr),
    Architecture("SegFormer", "transformers", _segformer),
    Architecture("CLIP, vision", "transformers", _clip),
    Architecture("U-Net", "torch", _unet),
)
