"""Small networks of many kinds: what each does to channels is in its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
IMAGE = (2, 3, 16, 16)


def normed(ins: int, outs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outs), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = ins * expansion
        layers = [nn.Sequential(*normed(ins, hidden, 1))] if expansion != 1 else []
        layers += [nn.Sequential(*normed(hidden, hidden, 3, stride, hidden)), *normed(hidden, outs, 1)[:2]]
        self.conv = nn.Sequential(*layers)
        self.skips = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skips else self.conv(x)


class MobileNetV2(nn.Module):
    """Depthwise convolutions and skips; the names of torchvision's weights at full width."""

    FULL = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, stages: Any = FULL, first: int = 32, last: int = 1280, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*normed(3, first, 3, 2))]
        ins = first
        for expansion, outs, count, stride in stages:
            for at in range(count):
                layers.append(InvertedResidual(ins, outs, stride if at == 0 else 1, expansion))
                ins = outs
        self.features = nn.Sequential(*layers, nn.Sequential(*normed(ins, last, 1)))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Vgg(nn.Module):
    """Images flattened before the classifier: 16 positions of a channel go at once."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(16 * 4 * 4, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class DenseNet(nn.Module):
    """Everything before is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        widths = (8, 14, 20)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 6, 3, padding=1)) for n in widths
        )
        self.norm, self.head = nn.BatchNorm2d(26), nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = functional.relu(self.norm(torch.cat(features, 1)))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """Skips by concatenation, transposed convolutions, group norms, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Conv2d(16, 32, 3, 2, 1)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2 = nn.Conv2d(32, 16, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join1 = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(one)
        x = functional.leaky_relu(self.middle(two))
        x = functional.relu(self.join2(torch.cat([two, self.up2(x)], dim=1)))
        x = functional.relu(self.join1(torch.cat([one, self.up1(x)], dim=1)))
        return self.last(functional.interpolate(x, scale_factor=2, mode="bilinear"))


class ShuffleUnit(nn.Module):
    """Half of the channels pass by, both halves are shuffled (ShuffleNet V2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *normed(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half),
            *normed(half, half, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        by, through = x.chunk(2, dim=1)
        x = torch.cat([by, self.branch(through)], dim=1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ChannelAttention(nn.Module):
    """Squeeze and excite: a channel's factor is made of all channels' means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        factor = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.last((x * factor).amax((2, 3)))


class Inception(nn.Module):
    """Branches of several widths side by side, one of them a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one = nn.Conv2d(12, 6, 1)
        self.three = nn.Sequential(nn.Conv2d(12, 8, 1), nn.PReLU(8), nn.Conv2d(8, 8, 3, padding=1))
        self.gated = nn.Sequential(nn.Conv2d(12, 16, 1), nn.GLU(1))
        self.last = nn.Conv2d(6 + 8 + 8 + 12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        pooled = functional.max_pool2d(x, 3, 1, 1)
        return self.last(torch.cat([self.one(x), self.three(x), self.gated(x), pooled], 1).relu())


class TiedModel(nn.Module):
    """A language model whose head is its embedding: only what is between may go."""

    def __init__(self, vocabulary: int = 20, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(functional.gelu(self.up(self.embed(tokens)))))


class Recurrent(nn.Module):
    """A GRU, which is left alone, between layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.hidden = nn.Linear(6, 24), nn.Linear(24, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.out, self.last = nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.hidden(self.into(x).relu()))
        return self.last(self.out(states[:, -1]).relu())


class OwnAttention(nn.Module):
    """Attention written out, heads in the batch, queries and keys normed, one projection for all three."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (part.reshape(-1, length, self.head_dim) for part in (self.norm(q), self.norm(k), v))
        mixed = torch.bmm(torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2)).softmax(-1), v)
        return x + self.out(mixed.view(batch, -1, length, self.head_dim).transpose(1, 2).flatten(2))


def image(net: nn.Module, size: tuple[int, ...] = IMAGE) -> Built:
    return net, (torch.randn(size),), {}


def tokens(net: nn.Module, vocabulary: int = 20) -> Built:
    ids = torch.randint(0, vocabulary, (2, 6))
    return net, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def resnet() -> Built:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=5)
    return image(transformers.ResNetForImageClassification(config), (2, 3, 32, 32))


def resnext() -> Built:
    block = [*normed(8, 16, 1), *normed(16, 16, 3, 1, 8), nn.Conv2d(16, 24, 3, groups=2), nn.Conv2d(24, 5, 1)]
    return image(nn.Sequential(*normed(3, 8, 3), *block))


def super_resolution() -> Built:
    shuffle = [nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(), nn.Conv2d(8, 3, 3, padding=1)]
    return image(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), *shuffle))


def depthwise_up() -> Built:
    layers = [nn.Conv2d(3, 12, 1), nn.ConvTranspose2d(12, 24, 2, 2, groups=12), nn.InstanceNorm2d(24, affine=True)]
    layers += [nn.Upsample(scale_factor=2), nn.Conv2d(24, 48, 3, groups=24), nn.Conv2d(48, 2, 1)]
    return image(nn.Sequential(*layers))


def encoder() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), (torch.randn(2, 5, 16),), {}


def vit() -> Built:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4
    )
    return image(transformers.ViTForImageClassification(config))


def convnext() -> Built:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0)
    return image(transformers.ConvNextForImageClassification(config), (2, 3, 32, 32))


def bert() -> Built:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return tokens(transformers.BertForSequenceClassification(config))


def distilbert() -> Built:
    config = transformers.DistilBertConfig(vocab_size=20, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    return tokens(transformers.DistilBertForSequenceClassification(config))


def llama() -> Built:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tokens(transformers.LlamaForCausalLM(config))


def gpt2() -> Built:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return tokens(transformers.GPT2LMHeadModel(config))


NARROW = ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 1, 2))

ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "resnet": resnet,
    "mobilenet_v2": lambda: image(MobileNetV2(NARROW, 8, 32, 5), (2, 3, 32, 32)),
    "vgg": lambda: image(Vgg()),
    "densenet": lambda: image(DenseNet()),
    "unet": lambda: image(UNet()),
    "resnext": resnext,
    "shufflenet_v2": lambda: image(nn.Sequential(*normed(3, 16, 3), ShuffleUnit(16), nn.Conv2d(16, 5, 1))),
    "squeeze_excite": lambda: image(ChannelAttention()),
    "inception": lambda: image(Inception()),
    "super_resolution": super_resolution,
    "depthwise_up": depthwise_up,
    "convnext": convnext,
    "vit": vit,
    "bert": bert,
    "distilbert": distilbert,
    "llama_gqa": llama,
    "gpt2": gpt2,
    "own_attention": lambda: (nn.Sequential(nn.Linear(16, 16), OwnAttention()), (torch.randn(2, 5, 16),), {}),
    "transformer_encoder": encoder,
    "tied_language_model": lambda: (TiedModel(), (torch.randint(0, 20, (2, 6)),), {}),
    "recurrent": lambda: (Recurrent(), (torch.randn(2, 5, 6),), {}),
}
