"""Presets of standalone networks, `cosa-segment PRESET`: a network's recipe on a data set (CoSA-MS, Tab. 2).

A recipe is a function of a CoSA preset, whose data set it takes; its docstring is the lab note. Full-size
ones have the values of the source that the paper names for the network, and twice VOC's steps on COCO, as
CoSA has (paper silent). What all have otherwise than their sources: the learning rate falls to 0, and images
are evaluated as CoSA's, squares at five scales. None was run by us at full size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from cosa.config import Config, NetworkConfig, OptimConfig
from cosa.config.presets import Presets, coco, coco_tiny, shapes, voc, voc_tiny


def vit(base: Config) -> Config:
    """CoSA's own ViT with its LargeFOV decoder, trained as CoSA trains it.

    Hardware: one GPU of 24 GB on VOC. Published: 80.5 mIoU on VOC val, fully supervised (Tab. 2).
    Sources: the preset `voc`, but for the terms of the loss; the warm-up's steps are segmentation's, too.
    """
    network = base.network.replace(architecture="largefov_vit", aux_head=False)
    if _is_small(base):
        return _small(base, network)
    train = base.train.replace(warmup=0)
    return Config(data=base.data, network=network, optim=base.optim, train=train, evaluation=base.evaluation)


def deeplabv3plus(base: Config) -> Config:
    """DeepLabV3+ with ResNet-101-D at output stride 16, as BECO has it.

    Hardware: four GPUs of 24 GB (--workers 4), or fewer with train.accumulate, where BatchNorm sees fewer
    images at a time. Published: CoSA-MS 76.5 on VOC val, 50.9 on COCO val; supervised 77.6 (Tab. 2).
    Sources: BECO's code (main.py): SGD of 0.01 for all, momentum 0.9, decay 1e-4, power 0.9, 80 epochs of
    VOC's 10,582 images in batches of 16, crops of 512, scales 0.5-2, flips and no other augmentation, images
    of 512 pixels in evaluation. Weights: GluonCV's ResNet-101-D, theirs being OpenMMLab's.
    """
    encoder, pretrained = _encoder(base, "resnet101d.gluon_in1k", tiny="resnet18.tv_in1k", toy="resnet18")
    network = NetworkConfig(
        architecture="deeplabv3plus",
        encoder=encoder,
        pretrained=pretrained,
        aux_head=False,
        decoder_channels=64 if _is_small(base) else 256,
    )
    if _is_small(base):
        return _small(base, network, rate=3e-3, side=128, batch_size=4)
    sgd = OptimConfig(
        algorithm="sgd", lr=0.01, head_lr_scale=1.0, weight_decay=1e-4, beta1=0.9, lr_warmup=0, power=0.9
    )
    plain: dict[str, Any] = {"crop_size": 512, "strong_appearance": False, "blur_prob": 0.0}
    return _standalone(base, network, sgd, iterations=52_910, batch_size=16, size=512, **plain)


def wideresnet38(base: Config) -> Config:
    """WideResNet38 dilated to stride 8 with LargeFOV, as MCTformer's last step has it.

    Hardware: one GPU of 24 GB. Published: CoSA-MS 76.6 on VOC val, 50.1 on COCO val; supervised 80.8
    (Tab. 2). Needs --network.weights FILE, see cosa/networks/wideresnet.py.
    Sources: MCTformer's code (seg/train_seg.py, run_seg.sh): 7e-4 and ten times that for the decoder, power
    0.9, 30 epochs of 10,582 images in batches of 4, scales 0.7-1.3, flips and no other augmentation; crops of
    321 there, of 320 here, a multiple of the stride. Its SGD takes its decay of 1e-5 in the place of the
    momentum: it has no decay and a momentum of 1e-5, and so have we. BatchNorm stays as published.
    """
    network = NetworkConfig(
        architecture="largefov_wideresnet38",
        encoder="wideresnet38_thin" if _is_small(base) else "wideresnet38",
        pretrained=False,
        aux_head=False,
        decoder_channels=64 if _is_small(base) else 512,
        decoder_dilation=2 if _is_small(base) else 12,
    )
    if _is_small(base):
        return _small(base, network, iterations=1000)
    sgd = OptimConfig(
        algorithm="sgd", lr=7e-4, head_lr_scale=10.0, weight_decay=0.0, beta1=1e-5, lr_warmup=0, power=0.9
    )
    plain: dict[str, Any] = {"scale_min": 0.7, "scale_max": 1.3, "strong_appearance": False, "blur_prob": 0.0}
    return _standalone(base, network, sgd, iterations=79_350, batch_size=4, crop_size=320, **plain)


def upernet(base: Config) -> Config:
    """UPerNet with Swin-B and an auxiliary FCN head, as mmsegmentation has it.

    Hardware: eight GPUs of 24 GB (--workers 8), or fewer with train.accumulate, where BatchNorm sees fewer
    images at a time. Published: CoSA-MS 81.4 on VOC val, 53.7 on COCO val; supervised 83.4 (Tab. 2).
    Sources: mmsegmentation's upernet_swin_base_patch4_window7_512x512: AdamW of 6e-5 for all, decay 0.01 but
    not of norms, 1,500 steps of rise, power 1, stochastic depth 0.3, crops of 512, scales 0.5-2, 0.4 of the
    auxiliary loss, batches of 16. Otherwise than there: Table 10's appearance and blur in the place of its
    photometric distortion; biases do not decay, tables of position biases do. 40,000 steps: its longer
    schedule for VOC (paper silent). Weights: ImageNet-1k's, as there; the paper's are not named.
    """
    encoder, pretrained = _encoder(
        base,
        "swin_base_patch4_window7_224.ms_in1k",
        tiny="swin_tiny_patch4_window7_224.ms_in1k",
        toy="swin_tiny_patch4_window7_224",
    )
    toy: dict[str, Any] = {"patch_size": 2, "width": 32, "depth": 2, "heads": 2} if not pretrained else {}
    network = NetworkConfig(
        architecture="upernet",
        encoder=encoder,
        pretrained=pretrained,
        drop_path=0.0 if _is_small(base) else 0.3,
        decoder_channels=64 if _is_small(base) else 512,
        **toy,
    )
    if _is_small(base):
        return _small(base, network, rate=2e-3)
    adamw = OptimConfig(lr=6e-5, head_lr_scale=1.0, weight_decay=0.01, decay_vectors=False, power=1.0)
    return _standalone(base, network, adamw, iterations=40_000, batch_size=16, size=512, crop_size=512)


def _is_small(base: Config) -> bool:
    """Whether a preset's network is not the paper's, but one for a CPU."""
    return base.network.encoder != NetworkConfig().encoder


def _encoder(base: Config, full: str, *, tiny: str, toy: str) -> tuple[str, bool]:
    """The encoder for a data set, and whether it starts from published weights: on `shapes` it does not."""
    if base.data.layout == "shapes":
        return toy, False
    return (tiny if _is_small(base) else full), True


def _small(
    base: Config,
    network: NetworkConfig,
    *,
    rate: float = 1e-3,
    side: int = 64,
    iterations: int = 400,
    batch_size: int = 8,
) -> Config:
    """What a network has on a data set for a CPU: AdamW, and crops of a stride that fits all of them.

    Args:
        base: A CoSA preset.
        network: The small network.
        rate: Learning rate on `shapes`; this and the rest by measurement on scenes that are not its val.
            Elsewhere all have 3e-4 in 800 steps of 8 crops of 160 pixels, which was not measured.
        side: Pixels that the 64 of a `shapes` image are enlarged to, so that coarse strides see objects.
        iterations: Steps on `shapes`.
        batch_size: Images of a step there.
    """
    scales = {}
    if base.data.layout == "shapes":
        larger = side / 64
        scales = {"scale_min": 0.75 * larger, "scale_max": 1.5 * larger}
    else:
        rate, side, iterations, batch_size = 3e-4, 160, 800, 8
    adamw = OptimConfig(lr=rate, head_lr_scale=2.0, decay_vectors=False, lr_warmup=50)
    return Config(
        data=base.data.replace(crop_size=side, **scales),
        network=network,
        optim=adamw,
        train=base.train.replace(iterations=iterations, warmup=0, batch_size=batch_size),
        evaluation=base.evaluation.replace(every=iterations // 2, size=side),
    )


def _standalone(
    base: Config,
    network: NetworkConfig,
    optim: OptimConfig,
    *,
    iterations: int,
    batch_size: int,
    size: int = 448,
    **data: Any,
) -> Config:
    """A run on the data set of `base`; `size` is that of images in evaluation, `data` what is otherwise."""
    iterations *= 2 if base.data.layout == "coco" else 1
    return Config(
        data=base.data.replace(**data),
        network=network,
        optim=optim,
        train=base.train.replace(iterations=iterations, warmup=0, batch_size=batch_size),
        evaluation=base.evaluation.replace(every=iterations // 4, size=size),
    )


RECIPES: MappingProxyType[str, Callable[[Config], Config]] = MappingProxyType(
    {make.__name__: make for make in (vit, deeplabv3plus, wideresnet38, upernet)}
)
"""The networks of Table 2 by short names, each a function of the CoSA preset whose data set it learns."""


_SMALL_TITLES = {
    "vit": "CoSA's own small ViT with its LargeFOV decoder",
    "deeplabv3plus": "DeepLabV3+ with ResNet-18 at output stride 16",
    "wideresnet38": "A thin WideResNet38 with LargeFOV, from scratch",
    "upernet": "UPerNet with a small Swin Transformer and an auxiliary FCN head",
}

_OPTIONS = {
    "vit": " --train.accumulate 2",
    "coco_vit": " --workers 2 --train.accumulate 2",  # as CoSA itself on COCO
    "deeplabv3plus": " --workers 4",
    "wideresnet38": " --network.weights FILE",
    "upernet": " --workers 8",
}
"""What a command at full size needs on the hardware that its note names, by recipe or preset."""


def _preset(base: Callable[[], Config], recipe: str) -> Callable[[], Config]:
    """A recipe on a data set, with its lab note."""
    make, name = RECIPES[recipe], f"{base.__name__}_{recipe}"

    def preset() -> Config:
        return make(base())

    settings = base()
    data = settings.data
    command = f"cosa-segment {name} --labels LABELS"
    if data.layout != "shapes":
        command += f" --data.root {data.root.replace('data/', 'DIR/', 1)}"
    if _is_small(settings):
        note = (
            f"{_SMALL_TITLES[recipe]}.\n\n"
            "Hardware: one CPU core, in minutes.\n"
            "Sources: the network's, made small; rates and steps are ours, see `_small` in this module."
        )
    else:
        note = inspect.getdoc(make) or ""
        command += _OPTIONS.get(name) or _OPTIONS[recipe]
    preset.__doc__ = f"{note}\nCommand: {command}\n"
    return preset


STANDALONE: Presets = MappingProxyType(
    {
        f"{base.__name__}_{recipe}": _preset(base, recipe)
        for base in (shapes, voc, voc_tiny, coco, coco_tiny)
        for recipe in RECIPES
    }
)
"""Presets of `cosa-segment`: DATA_NETWORK."""
