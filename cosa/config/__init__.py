"""Everything one training run can be told, as frozen data with its checks.

A range is part of a setting's type; laws that speak of two settings stand below their section. The
string under each field is its documentation and becomes its `--help`. Pydantic is all that is imported, so
that `--help` and a sweep's plan cost no import of torch. A weight of 0 leaves that term out of the sum
altogether.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Set
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic.fields import FieldInfo

from cosa.config.laws import Section, law, must
from cosa.config.laws import nearest as nearest

Count = Annotated[int, law("be >= 1", lambda n: n >= 1)]
Natural = Annotated[int, law("be >= 0", lambda n: n >= 0)]
Pixels = Annotated[int, law("be > 0 pixels", lambda n: n > 0)]
OrOwn = Annotated[int, law("be >= 0 (0: own)", lambda n: n >= 0)]
Share = Annotated[float, law("lie in [0, 1]", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, law("lie in [0, 1)", lambda x: 0 <= x < 1)]
Inner = Annotated[float, law("lie in (0, 1)", lambda x: 0 < x < 1)]
Positive = Annotated[float, law("be finite and > 0", lambda x: 0 < x < math.inf)]
Weight = Annotated[float, law("be finite and >= 0", lambda x: 0 <= x < math.inf)]
_SCALES = law("hold one or more scales in (0, 4]", lambda scales: scales and all(0 < s <= 4 for s in scales))
Scales = Annotated[tuple[float, ...], _SCALES]
_BAND = law("be empty or hold low, high with 0 < low < high < 1", lambda b: not b or _is_band(b))
Band = Annotated[tuple[float, ...], _BAND]


def _is_band(band: tuple[float, ...]) -> bool:
    return len(band) == 2 and 0 < band[0] < band[1] < 1


Mean = Annotated[
    tuple[float, ...],
    law(
        "be empty or hold three numbers in [0, 1]", lambda m: len(m) in {0, 3} and all(0 <= x <= 1 for x in m)
    ),
]
Deviation = Annotated[
    tuple[float, ...],
    law(
        "be empty or hold three numbers in (0, 1]", lambda d: len(d) in {0, 3} and all(0 < x <= 1 for x in d)
    ),
]

T = TypeVar("T")
_MACHINE = object()
OnMachine = Annotated[T, _MACHINE]
"""A setting that says where and how often, not what: two runs that differ only there are the same run."""


_SHA256 = re.compile("([0-9a-fA-F]{64})?")
Sha256 = Annotated[str, law("be 64 hex digits or empty", _SHA256.fullmatch)]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and deviation of each channel, of values in [0, 1]."""


class DataConfig(Section):
    """Which images are read, and how the two views are cut from them."""

    layout: Literal["shapes", "voc", "coco", "folder"] = "voc"
    """Layout of the data set: PASCAL VOC 2012, MS-COCO 2014, or `folder`, images beside a labels.csv of your
    own; `shapes` writes its own first."""
    root: OnMachine[str] = "data/VOCdevkit/VOC2012"
    """Folder of the data set, as the README shows it for each layout (for `shapes`: where to write it)."""
    archive: OnMachine[str] = ""
    """Archive (.tar, .tar.gz or .zip; a path, or a URL such as s3://...) that each machine unpacks once into
    `root`; empty where the data set lies there already."""
    archive_sha256: OnMachine[Sha256] = ""
    """SHA-256 that the archive must have, as `cosa-data pack` prints it; empty takes what comes."""
    cache: OnMachine[str] = "data/cache"
    """Folder for what is derived from the data set once, such as COCO's masks; may be deleted."""
    train_split: str = "train_aug"
    """List of training images; `train_aug` without a list file is all of SegmentationClassAug less val."""
    val_split: str = "val"
    """List of images that evaluation reads; empty evaluates nothing, one without masks classification
    alone."""
    keep_empty: bool = True
    """Whether COCO's images without a single object stay in their split; the lists that the authors use leave
    them out, and so do our presets: 82,081 images to train on and 40,137 of val."""
    crop_size: Pixels = 448
    """Side of the square training crop, pixels; a multiple of the patch size."""
    scale_min: Annotated[float, law("lie in (0, 8]", lambda x: 0 < x <= 8)] = 0.5
    """Smallest factor of the random rescaling of both views, > 0."""
    scale_max: Annotated[float, law("be <= 8", lambda x: x <= 8)] = 2.0
    """Largest factor of the random rescaling of both views, >= scale_min."""
    mean: Mean = ()
    """Mean of each channel that images are normalised by, of values in [0, 1]; empty takes that of the
    encoder's published weights, ImageNet's from scratch. A change of the encoder empties it again."""
    std: Deviation = ()
    """Deviation of each channel that images are normalised by, as `mean`."""
    flip_prob: Share = 0.5
    """Probability of the horizontal flip that both views share, in [0, 1]."""
    blur_prob: Share = 0.5
    """Probability of Gaussian blur, drawn for each view on its own, in [0, 1]."""
    strong_appearance: bool = True
    """Whether the strong view gets one appearance transformation of the paper's Table 10."""
    loader_workers: OnMachine[Natural] = 2
    """Processes that read and augment images for each training process; 0 reads in the process itself."""

    def model_post_init(self, _: object) -> None:
        """Called by pydantic: laws of two settings."""
        if "@" in self.archive.partition("://")[2].partition("/")[0]:
            law = "hold no user or password, since it is kept with every run"
            refused = must("data.archive", law, re.sub("//[^/]*@", "//***@", self.archive))
            raise ValueError(f"{refused}; give them by the environment variables of that storage")
        if self.scale_max < self.scale_min:
            law = f"lie in [data.scale_min, 8] = [{self.scale_min}, 8]"
            raise ValueError(must("data.scale_max", law, self.scale_max))


PAPER_ENCODER = "vit_base_patch16_224.orig_in21k_ft_in1k"
"""The paper's encoder, with the weights that the authors load."""


class NetworkConfig(Section):
    """The encoder and the heads on it: CoSA's own network, which ON and AN share, or a standalone one."""

    architecture: Literal["cosa", "largefov_vit", "deeplabv3plus", "upernet", "largefov_wideresnet38"] = (
        "cosa"
    )
    """`cosa`, or a standalone segmentation network: CoSA's ViT with its decoder alone (`largefov_vit`), or
    one of CoSA-MS (Tab. 2)."""
    encoder: str = PAPER_ENCODER
    """Name of a timm model with the tag of its weights, as vit_base_patch16_224.orig_in21k_ft_in1k; without a
    tag timm's default is taken, and written down. A Vision Transformer; for `deeplabv3plus` a ResNet, for
    `upernet` a Swin Transformer or a ResNet; `largefov_wideresnet38` has its own."""
    pretrained: bool = True
    """Start from timm's published weights; asks the network the first time."""
    weights: str = ""
    """Local .safetensors or .pth file to start from instead of `pretrained`, of the architecture `encoder`
    and, unless `data.mean` says otherwise, for images of its mean and deviation."""
    weights_sha256: Sha256 = ""
    """SHA-256 that the file `weights` must have; where it is empty that of the file is written down."""
    patch_size: OrOwn = 0
    """Side of a patch, pixels; 0 keeps the encoder's own."""
    width: OrOwn = 0
    """Channels of the encoder, of a Swin's first stage; 0 keeps its own."""
    depth: OrOwn = 0
    """Blocks of the encoder, of each stage of a Swin; 0 keeps its own."""
    heads: OrOwn = 0
    """Attention heads of the encoder, of a Swin's first stage; 0 keeps its own."""
    drop_path: Decay = 0.0
    """Stochastic depth rate of the online network, in [0, 1)."""
    aux_block: Annotated[int, law("be <= -2, a block before the last", lambda n: n <= -2)] = -3
    """Block that M-dagger is read from, counted from the end (-1 is the last block)."""
    aux_head: bool = True
    """Whether M-dagger is learned at all; without it neither cls-dagger nor c2s-dagger is trained, and what
    is reported of M-dagger is that of random numbers. CSC needs it. For `upernet`, whether it has an
    auxiliary FCN head; the other standalone networks have none."""
    aux_norm: bool = False
    """Whether M-dagger is read behind the encoder's final norm, as M is; the authors read the block's raw
    output."""
    train_pos_embed: bool = False
    """Whether published position embeddings are resampled to the crop once and then trained; else they stay
    as they are and are resampled in each pass, as the authors do. From scratch they are always trained."""
    decoder_channels: Count = 512
    """Channels of the decoder's convolutions."""
    decoder_dilation: Count = 5
    """Dilation of the LargeFOV decoder's two 3x3 convolutions, in patches."""

    def model_post_init(self, _: object) -> None:
        """Called by pydantic: laws of two settings."""
        if self.pretrained and self.weights:
            law = "be false where network.weights names a file"
            raise ValueError(must("network.pretrained", law, self.pretrained))
        if self.aux_head and self.architecture not in {"cosa", "upernet"}:
            law = f"be false where network.architecture is {self.architecture}, which has no auxiliary head"
            raise ValueError(must("network.aux_head", law, self.aux_head))
        if self.pretrained and self.architecture == "largefov_wideresnet38":
            law = "be false for a WideResNet38, whose weights come from a file: network.weights"
            raise ValueError(must("network.pretrained", law, self.pretrained))

    @property
    def from_scratch(self) -> bool:
        """Whether the encoder starts from random numbers."""
        return not (self.pretrained or self.weights)

    @property
    def sees_imagenet(self) -> bool:
        """Whether its own mean and deviation are ImageNet's, whatever timm says of it.

        Paper silent: the weights of its encoder were trained with 0.5 and 0.5, but the authors' code feeds
        it images in ImageNet's, and so do we. WideResNet38's weights were trained with them.
        """
        wide = self.architecture == "largefov_wideresnet38"
        return self.from_scratch or wide or self.encoder == PAPER_ENCODER


class CamConfig(Section):
    """How AN's maps of one image are fused before they become pseudo-labels."""

    scales: Scales = (1.0, 0.5, 1.5)
    """Scales of the weak view that AN sees, each in (0, 4]."""
    flip: bool = True
    """Whether AN sees each scale flipped, too."""
    fusion: Literal["max", "sum"] = "max"
    """How AN's M of several scales become one: `max` as Alg. 1 says, or the `sum` of ReLU(M) as the authors'
    code does; the two flips of a scale always by maximum, and evaluation always by maximum."""
    aux_fusion: Literal["max", "sum", "last"] = "max"
    """The same of M-dagger; `last` takes the last of `scales` alone, as the authors' code does."""
    stride: Count = 1
    """Pixels of the crop per pixel of the pseudo-labels; 1 is the crop's own resolution."""
    source: Literal["assignment", "online"] = "assignment"
    """Network whose CPL and SPL supervise ON: `assignment` swaps assignments (SA), `online` does not."""


class ThresholdConfig(Section):
    """The confidence threshold xi that splits foreground from background (Eq. 3 and 6)."""

    mode: Literal["dynamic", "fixed"] = "dynamic"
    """`dynamic` searches xi by Eq. 6 (DT), `fixed` keeps `xi`."""
    xi: Inner = 0.45
    """The fixed threshold, and where the dynamic one starts while its queue fills, in (0, 1)."""
    band: Band = ()
    """Two fixed thresholds low,high around `xi`, as in the authors' logs: pixels from low up to high have no
    pseudo-label; empty has `xi` part foreground from background everywhere, as in Eq. 3."""
    aux_band: Band = ()
    """The same for M-dagger; empty takes `band`."""
    queue: Count = 100
    """Batches whose activations the two Gaussians are fitted to, >= 1."""
    min_activation: Annotated[float, law("be < 1", lambda x: x < 1)] = 0.05
    """Activations up to this value are left out of the fit, in [0, 1); negative lets all pixels in."""
    min_std: Annotated[float, law("lie in (0, 0.5]", lambda x: 0 < x <= 0.5)] = 0.1
    """Least standard deviation of the two Gaussians, in (0, 0.5]; keeps them off the CAMs' spikes."""

    def model_post_init(self, _: object) -> None:
        """Called by pydantic: laws of two settings."""
        for name, band in (("band", self.band), ("aux_band", self.aux_band)):
            if band and self.mode != "fixed":
                raise ValueError(
                    must("threshold.mode", f"be fixed where threshold.{name} is given", self.mode)
                )
            if band and not band[0] <= self.xi <= band[1]:
                raise ValueError(must("threshold.xi", f"lie in threshold.{name} = {list(band)}", self.xi))


class RawConfig(Section):
    """Perplexity and the reliability-based adaptive weighting of c2s (Eq. 4 and 5)."""

    enabled: bool = True
    """Weight c2s by reliability (RAW); off gives plain cross-entropy."""
    alpha: Annotated[float, law("lie in (0, 1]", lambda x: 0 < x <= 1)] = 0.8
    """lambda_alpha of Eq. 4: -log(alpha) is the smallest perplexity; in (0, 1]."""
    beta: Positive = 1.0
    """lambda_beta of Eq. 4: exponent of the perplexity, > 0."""


class C2sConfig(Section):
    """CAM pseudo-labels supervise the segmentation (Eq. 5)."""

    weight: Weight = 0.1
    """lambda_c2s of Eq. 11, for each of both CAM heads, >= 0; 0 leaves the term out. The authors' code takes
    0.1 of half their sum: that is a weight of 0.05."""
    aux: bool = True
    """Whether M-dagger's CPL supervise the segmentation, too (the second c2s term of Eq. 11)."""
    average: Literal["pixels", "balanced"] = "pixels"
    """The mean over all pixels (Eq. 5), or `balanced`: half of that over the background's pixels and half of
    that over the foreground's, as in the authors' code."""


class S2cConfig(Section):
    """Segmentation pseudo-labels guide the CAMs (GC, Eq. 7 and 8)."""

    weight: Weight = 0.05
    """lambda_s2c of Eq. 11, >= 0; 0 leaves the term out (no guided CAMs)."""
    tau: Positive = 0.01
    """Softmax temperature that sharpens the SPL (Eq. 7), > 0."""
    cam: Literal["raw", "relu"] = "raw"
    """What is guided: `raw` M in the resolution of the pseudo-labels (Eq. 8), or `relu`: ReLU(M) on the patch
    grid, as in the authors' code, where a negative activation learns nothing."""
    source: Literal["spl", "gt", "noise", "none"] = "spl"
    """What guides the CAMs (Fig. 1): the SPL, the oracle's ground-truth masks, random masks, or nothing."""
    detach: Literal["none", "features", "classifier"] = "none"
    """What of M = F W the guidance's gradient does not reach (Tab. 4a): F, W, or nothing is spared."""


class CscConfig(Section):
    """Contrastive separation in CAMs (CSC, Eq. 9 and 10)."""

    weight: Weight = 0.1
    """lambda_csc of Eq. 11, >= 0; 0 leaves the term out."""
    epsilon: Annotated[float, law("be > 0", lambda x: x > 0)] = 1.0
    """Largest perplexity of a pixel that is contrasted, > 0; `inf` contrasts all."""
    tau: Positive = 0.5
    """InfoNCE temperature on the cosine similarity of class-activation vectors, > 0."""
    max_anchors: Annotated[int, law("be >= 2", lambda n: n >= 2)] = 1024
    """Most positions contrasted per image, drawn at random; bounds memory at its square."""


class EmaConfig(Section):
    """How AN follows ON."""

    momentum: Share = 0.9994
    """m of AN <- m AN + (1 - m) ON after every step, in [0, 1]; 1 freezes AN."""


class OptimConfig(Section):
    """AdamW, or SGD with momentum, with linear warm-up and polynomial decay."""

    algorithm: Literal["adamw", "sgd"] = "adamw"
    """`adamw`, or `sgd` with the momentum `beta1`, whose weight decay is part of the gradient."""
    lr: Positive = 6e-5
    """Peak learning rate of the encoder, > 0."""
    head_lr_scale: Positive = 10.0
    """Factor on the learning rate of all that is not the encoder, > 0."""
    weight_decay: Weight = 0.01
    """Weight decay, >= 0; decoupled in AdamW."""
    decay_vectors: bool = True
    """Whether biases and norms decay, too, as in the authors' code (paper silent)."""
    beta1: Decay = 0.9
    """Decay of AdamW's first moment, or SGD's momentum, in [0, 1)."""
    beta2: Decay = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    lr_warmup: Natural = 1500
    """Iterations over which the learning rate rises linearly from 0, >= 0."""
    power: Weight = 0.9
    """Exponent of the polynomial decay to 0, >= 0."""
    clip_norm: Weight = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""


class TrainConfig(Section):
    """The schedule of one run and how it computes."""

    seed: Annotated[int, law("lie in [0, 4294967296)", lambda n: 0 <= n < 2**32)] = 0
    """Seed of initial heads, data order, augmentations and anchors, >= 0."""
    iterations: Count = 20_000
    """Optimiser steps in all, >= 1."""
    warmup: Natural = 6_000
    """Steps of classification alone before co-training starts, in [0, iterations]."""
    batch_size: Count = 4
    """Images per step over all workers together: the result does not depend on how many share it."""
    accumulate: Count = 1
    """Micro-batches each worker splits its share of a batch into, to save memory, >= 1."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """`bf16` computes the networks in bfloat16 autocast; losses and weights stay in fp32. `auto` is `bf16` on
    GPUs that have it and `fp32` elsewhere. With `fp32` a GPU that has TF32 multiplies matrices in it."""
    compile: OnMachine[bool] = False
    """Compile the networks with torch.compile: pays off on GPUs and long runs."""
    log_every: OnMachine[Count] = 50
    """Steps between two lines of progress and metrics, >= 1."""
    checkpoint_every: OnMachine[Count] = 1_000
    """Steps between two whole-state checkpoints, >= 1."""
    keep_checkpoints: OnMachine[Count] = 2
    """Newest checkpoints kept on disk, >= 1."""

    def model_post_init(self, _: object) -> None:
        """Called by pydantic: laws of two settings."""
        if self.warmup > self.iterations:
            law = f"lie in [0, train.iterations] = [0, {self.iterations}]"
            raise ValueError(must("train.warmup", law, self.warmup))
        if self.batch_size % self.accumulate:
            law = f"divide train.batch_size = {self.batch_size}"
            raise ValueError(must("train.accumulate", law, self.accumulate))

    def at_a_time(self, workers: int) -> int:
        """Images in a micro-batch of each of `workers`, which all have the same number.

        Raises:
            ValueError: The batch does not divide so.
        """
        shares = workers * self.accumulate
        if self.batch_size % shares:
            law = f"be a multiple of workers x train.accumulate = {shares}"
            raise ValueError(must("train.batch_size", law, self.batch_size))
        return self.batch_size // shares


class EvaluationConfig(Section):
    """How a network is judged; never changes what is trained."""

    every: Count = 2_000
    """Steps between two evaluations, >= 1; one more follows the last step."""
    size: Pixels = 448
    """Side of the square that images are resized to before inference, pixels; a multiple of the patch."""
    scales: Scales = (1.0, 0.5, 1.5, 0.75, 1.25)
    """Scales whose predictions are averaged, each in (0, 4]."""
    flip: bool = True
    """Whether each scale is also predicted flipped."""
    batch_size: OnMachine[Count] = 8
    """Images per forward pass of the evaluation."""
    max_images: Natural = 0
    """Most images of the split that are evaluated, from its start; 0 takes all."""
    xi: Inner = 0.5
    """Threshold at which CPL quality is reported (paper Tables 1 and 4), in (0, 1)."""
    coexistence: tuple[str, ...] = ("bird", "train", "aeroplane", "boat")
    """Classes that C-mIoU averages: those that suffer from coexistence, by default the ones in Fig. 8."""
    train_split: str = ""
    """List of training images whose CPL are judged after the last step (Tab. 1, 4a); empty judges none."""
    crf: bool = False
    """Whether segmentation is judged after a dense CRF, too (Tab. 6); needs the extra `crf`."""
    panel_images: OnMachine[Natural] = 6
    """Images shown in the picture panel of every evaluation; 0 draws none."""
    panel_choice: OnMachine[Literal["random", "coexistence", "first"]] = "random"
    """Which images: drawn by `panel_seed`, of those with a class of `coexistence` alone, or the first."""
    panel_seed: OnMachine[Natural] = 0
    """Seed that draws the panel's images, >= 0."""


class SegmentationConfig(Section):
    """What a standalone segmentation network learns from, and how (CoSA-MS, Tab. 2)."""

    supervision: Literal["pseudo-labels", "masks"] = "pseudo-labels"
    """`pseudo-labels` of a CoSA run, or the ground-truth `masks`: the supervised upper bound, an oracle."""
    labels: OnMachine[str] = ""
    """Folder of the pseudo-labels of every training image, as cosa-predict RUN --pseudo-labels writes it."""
    labels_fingerprint: str = ""
    """Fingerprint that the pseudo-labels must have; where it is empty that of the folder is written down."""
    aux_weight: Weight = 0.4
    """Weight of an auxiliary head's cross-entropy, >= 0; 0 leaves the term out."""

    def model_post_init(self, _: object) -> None:
        """Called by pydantic: laws of two settings."""
        if self.labels and self.supervision == "masks":
            law = "be empty where segmentation.supervision is masks"
            raise ValueError(must("segmentation.labels", law, self.labels))


class Config(Section):
    """One training run. The defaults are the paper's setting of CoSA for PASCAL VOC 2012."""

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    cam: CamConfig = CamConfig()
    threshold: ThresholdConfig = ThresholdConfig()
    raw: RawConfig = RawConfig()
    c2s: C2sConfig = C2sConfig()
    s2c: S2cConfig = S2cConfig()
    csc: CscConfig = CscConfig()
    ema: EmaConfig = EmaConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    segmentation: SegmentationConfig = SegmentationConfig()

    def model_post_init(self, _: object) -> None:
        """Called by pydantic: laws of two sections."""
        if self.csc.weight and not self.network.aux_head and not self.standalone:
            law = "be true where csc.weight is not 0: M-dagger says what is contrasted"
            raise ValueError(must("network.aux_head", law, self.network.aux_head))
        if not self.standalone and self.segmentation != SegmentationConfig():
            law = "be a standalone network where settings of segmentation are given"
            raise ValueError(must("network.architecture", law, self.network.architecture))

    @property
    def standalone(self) -> bool:
        """Whether a segmentation network is trained on its own, on given labels, rather than CoSA."""
        return self.network.architecture != "cosa"

    @property
    def judged_network(self) -> Literal["assignment", "online", "standalone"]:
        """The network that results are of: AN, ON where there is no SA, or the standalone one."""
        return "standalone" if self.standalone else self.cam.source

    @property
    def final_network(self) -> Literal["assignment", "standalone"]:
        """The network that the run is for, which it leaves behind: AN, or the standalone one."""
        return "standalone" if self.standalone else "assignment"

    @property
    def guided(self) -> bool:
        """Whether s2c is trained at all: it has a weight and a source."""
        return self.s2c.weight > 0 and self.s2c.source != "none"

    @property
    def oracle(self) -> bool:
        """Whether training sees ground-truth masks, which weak supervision must not."""
        if self.standalone:
            return self.segmentation.supervision == "masks"
        return self.guided and self.s2c.source == "gt"


EARLIER: Mapping[str, Any] = {
    "data.mean": IMAGENET_MEAN,
    "data.std": IMAGENET_STD,
    "network.architecture": "cosa",
    "network.weights_sha256": "",
    "network.aux_norm": True,
    "network.train_pos_embed": True,
    "data.keep_empty": True,
    "network.aux_head": True,
    "cam.fusion": "max",
    "cam.aux_fusion": "max",
    "threshold.band": (),
    "threshold.aux_band": (),
    "c2s.average": "pixels",
    "s2c.cam": "raw",
    "optim.decay_vectors": False,
    "optim.algorithm": "adamw",
    "segmentation.supervision": "pseudo-labels",
    "segmentation.labels": "",
    "segmentation.labels_fingerprint": "",
    "segmentation.aux_weight": 0.4,
}
"""What every run did before these settings were: a whole file of settings without them means that, and where
they say it they leave no trace in an identity, so that earlier results are found again."""

# Sections that act only once co-training has begun: runs that differ only here share their warm-up.
COTRAINING_SECTIONS = frozenset({"cam", "threshold", "raw", "c2s", "s2c", "csc"})

# What a standalone network's training and evaluation never read.
COSA_ALONE = COTRAINING_SECTIONS | {"ema", "train.warmup", "evaluation.xi", "evaluation.train_split"}


@functools.cache
def fields() -> Mapping[str, FieldInfo]:
    """Every setting by its dotted name, in the order of the sections: its type, default and description."""
    found = {
        f"{section}.{item}": known
        for section, settings in Config()
        for item, known in type(settings).model_fields.items()
    }
    return types.MappingProxyType(found)


MACHINE_FIELDS = frozenset(name for name, known in fields().items() if _MACHINE in known.metadata)


def flatten(config: Config) -> dict[str, Any]:
    """Every setting of `config` by its dotted name."""
    return {f"{section}.{item}": value for section, settings in config for item, value in settings}


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with some settings changed, all checks passed again.

    Mean, deviation and SHA-256 belong to the weights that the encoder starts from, a fingerprint to its
    pseudo-labels: where `changes` names others, they are emptied unless it gives them, too.

    Args:
        config: Where all other settings come from.
        changes: Values by dotted name; text is parsed by the setting's type ("0.1", "true", "1.0,0.5").

    Raises:
        ValueError: An unknown name (the nearest known one is suggested) or a value against its law.
        TypeError: A value of the wrong type.
    """
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        known = fields().get(name)
        if known is None:
            raise ValueError(must("setting", "be one that exists", name) + nearest(name, fields()))
        section, item = name.split(".")
        by_section.setdefault(section, {})[item] = _read(known.annotation, value)
    network = by_section.get("network", {})
    if _start(config.network) != _start(config.network.model_copy(update=network)):
        for name in ("data.mean", "data.std", "network.weights_sha256"):
            section, item = name.split(".")
            by_section.setdefault(section, {}).setdefault(item, fields()[name].default)
    segmentation = by_section.get("segmentation", {})
    if PurePath(str(segmentation.get("labels", ""))).name not in {
        "",
        PurePath(config.segmentation.labels).name,
    }:
        segmentation.setdefault("labels_fingerprint", "")
    return config.replace(**{s: getattr(config, s).replace(**items) for s, items in by_section.items()})


def _start(network: NetworkConfig) -> tuple[str, bool, str]:
    """What says which weights the encoder starts from; a file by its name, wherever it lies."""
    return network.encoder, network.pretrained, PurePath(str(network.weights)).name


def _read(kind: Any, value: Any) -> Any:
    """Text as a value of the type `kind`, a list as a tuple; what does not fit stays and is refused later."""
    if typing.get_origin(kind) is tuple and isinstance(value, str | list | tuple):
        parts = filter(str.strip, value.split(",")) if isinstance(value, str) else value
        return tuple(_read(typing.get_args(kind)[0], part) for part in parts)
    if not isinstance(value, str) or kind not in {bool, int, float}:
        return value
    if kind is bool:
        return _TRUTH.get(value.strip().lower(), value)
    try:
        number = float(value)
    except ValueError:
        return value
    return number if kind is float else int(number) if number.is_integer() else value


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def absolute_paths(config: Config, home: Path) -> Config:
    """`config` with its relative paths taken from `home`, for processes that run elsewhere; URLs stay."""
    settings = flatten(config)
    names = ("data.root", "data.cache", "data.archive", "network.weights", "segmentation.labels")
    paths = {name: str(settings[name]) for name in names if settings[name] and "://" not in settings[name]}
    return override(config, {name: str(home / Path(path).expanduser()) for name, path in paths.items()})


def to_json(config: Config) -> str:
    """`config` as sorted, indented JSON with dotted names; `from_json` reads it back.

    Infinity is written as the text "inf": JSON has no number for it.
    """
    values = {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in flatten(config).items()}
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"


def from_json(text: str) -> Config:
    """The Config that `to_json` wrote, also where its version did not have all of today's settings.

    A file that leaves out others, too, is one that somebody wrote: what it does not name has the default.

    Raises:
        ValueError: The text is no JSON object of settings, or a setting breaks its law.
        TypeError: A setting has a value of the wrong type.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config must be JSON, got an error at line {error.lineno}: {error.msg}") from None
    if not isinstance(values, dict):
        raise TypeError(f"config must be a JSON object of dotted settings, got {type(values).__name__}")
    if fields().keys() - EARLIER.keys() <= values.keys():
        values = {**EARLIER, **values}
    return override(Config(), values)


def identity(config: Config) -> str:
    """Sixteen hex digits that two configs share exactly where they are the same experiment."""
    return _digest(config, MACHINE_FIELDS)


def warmup_identity(config: Config) -> str:
    """Sixteen hex digits that two configs share exactly where their warm-up phases are the same.

    Co-training settings and everything about evaluation stay out: the warm-up never reads them. So does the
    EMA: ON learns without AN there, and one warm-up can carry an AN for each momentum.
    """
    return _digest(config, MACHINE_FIELDS | COTRAINING_SECTIONS | {"evaluation", "ema", "data.val_split"})


def _digest(config: Config, ignored: Set[str]) -> str:
    """Of all settings but those, and those sections, `ignored`.

    Of a weights file its SHA-256 counts, its name where that is not known. Settings that do what all runs did
    before there were such settings are left out.
    """
    if config.standalone:
        ignored |= COSA_ALONE
    if not config.guided:  # however the term was switched off, its other settings say nothing
        config = config.replace(s2c=S2cConfig(weight=0.0))
    values, network = flatten(config), config.network
    values["network.weights"] = "" if network.weights_sha256 else PurePath(network.weights).name
    if network.from_scratch:
        values["network.train_pos_embed"] = True
    if network.sees_imagenet:
        values["data.mean"] = values["data.mean"] or IMAGENET_MEAN
        values["data.std"] = values["data.std"] or IMAGENET_STD
    kept = {
        name: value
        for name, value in values.items()
        if not ignored & {name, name.partition(".")[0]} and (name not in EARLIER or value != EARLIER[name])
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def difference(before: Config, after: Config) -> Iterator[tuple[str, Any, Any]]:
    """Settings in which two configs differ, as (dotted name, value before, value after)."""
    old, new = flatten(before), flatten(after)
    return ((name, old[name], new[name]) for name in old if old[name] != new[name])
