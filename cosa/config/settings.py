"""Everything one training run can be told, as frozen data with its checks.

Stdlib only, so that `--help` and a sweep's plan cost no import of torch. The string under each field is
its documentation and becomes its `--help`. A weight of 0 leaves that term out of the sum altogether.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal


def _require(condition: bool, name: str, law: str, got: object, remedy: str = "") -> None:
    """Raise the house's one form of error: `<name> must <law>, got <value>`, then what to do."""
    if not condition:
        raise ValueError(f"{name} must {law}, got {got!r}" + (f"; {remedy}" if remedy else ""))


def _require_scales(name: str, scales: tuple[float, ...]) -> None:
    _require(
        len(scales) > 0 and all(0 < scale <= 4 for scale in scales),
        name,
        "hold one or more scales in (0, 4]",
        scales,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are read, and how the two views are cut from them."""

    layout: Literal["shapes", "voc", "coco", "folder"] = "voc"
    """Layout of the data set: PASCAL VOC 2012, MS-COCO 2014, or `folder`, images beside a labels.csv of your
    own; `shapes` writes its own first."""
    root: str = "data/VOCdevkit/VOC2012"
    """Folder of the data set, as the README shows it for each layout (for `shapes`: where to write it)."""
    archive: str = ""
    """Archive (.tar, .tar.gz or .zip; a path, or a URL such as s3://...) that each machine unpacks once into
    `root`; empty where the data set lies there already."""
    archive_sha256: str = ""
    """SHA-256 that the archive must have, as `cosa-data pack` prints it; empty takes what comes."""
    cache: str = "data/cache"
    """Folder for what is derived from the data set once, such as COCO's masks; may be deleted."""
    train_split: str = "train_aug"
    """List of training images; `train_aug` without a list file is all of SegmentationClassAug less val."""
    val_split: str = "val"
    """List of images that evaluation reads; empty evaluates nothing, one without masks classification
    alone."""
    crop_size: int = 448
    """Side of the square training crop, pixels; a multiple of the patch size."""
    scale_min: float = 0.5
    """Smallest factor of the random rescaling of both views, > 0."""
    scale_max: float = 2.0
    """Largest factor of the random rescaling of both views, >= scale_min."""
    flip_prob: float = 0.5
    """Probability of the horizontal flip that both views share, in [0, 1]."""
    blur_prob: float = 0.5
    """Probability of Gaussian blur, drawn for each view on its own, in [0, 1]."""
    strong_appearance: bool = True
    """Whether the strong view gets one appearance transformation of the paper's Table 10."""
    loader_workers: int = 2
    """Processes that read and augment images for each training process; 0 reads in the process itself."""

    def __post_init__(self) -> None:
        _require(
            "@" not in self.archive.partition("://")[2].partition("/")[0],
            "data.archive",
            "hold no user or password, since it is kept with every run",
            re.sub("//[^/]*@", "//***@", self.archive),
            "give them by the environment variables of that storage",
        )
        _require(
            re.fullmatch(r"([0-9a-fA-F]{64})?", self.archive_sha256) is not None,
            "data.archive_sha256",
            "be 64 hex digits or empty",
            self.archive_sha256,
        )
        _require(self.crop_size > 0, "data.crop_size", "be > 0 pixels", self.crop_size)
        _require(0 < self.scale_min <= 8, "data.scale_min", "lie in (0, 8]", self.scale_min)
        _require(
            self.scale_min <= self.scale_max <= 8,
            "data.scale_max",
            f"lie in [data.scale_min, 8] = [{self.scale_min}, 8]",
            self.scale_max,
        )
        _require(0 <= self.flip_prob <= 1, "data.flip_prob", "lie in [0, 1]", self.flip_prob)
        _require(0 <= self.blur_prob <= 1, "data.blur_prob", "lie in [0, 1]", self.blur_prob)
        _require(self.loader_workers >= 0, "data.loader_workers", "be >= 0", self.loader_workers)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The encoder (any ViT of timm) and the heads on it; ON and AN share it."""

    encoder: str = "vit_base_patch16_224"
    """Name of a timm Vision Transformer."""
    pretrained: bool = True
    """Start from timm's published ImageNet weights; asks the network the first time."""
    weights: str = ""
    """Local .safetensors or .pth file in timm's naming to start from instead of `pretrained`."""
    patch_size: int = 0
    """Side of a patch, pixels; 0 keeps the encoder's own."""
    width: int = 0
    """Channels of the encoder; 0 keeps its own."""
    depth: int = 0
    """Blocks of the encoder; 0 keeps its own."""
    heads: int = 0
    """Attention heads of the encoder; 0 keeps its own."""
    drop_path: float = 0.0
    """Stochastic depth rate of the online network, in [0, 1)."""
    aux_block: int = -3
    """Block that M-dagger is read from, counted from the end (-1 is the last block)."""
    decoder_channels: int = 512
    """Channels of the LargeFOV decoder's two dilated convolutions."""
    decoder_dilation: int = 5
    """Dilation of the LargeFOV decoder's two 3x3 convolutions, in patches."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "depth", "heads"):
            _require(getattr(self, name) >= 0, f"network.{name}", "be >= 0 (0: own)", getattr(self, name))
        _require(0 <= self.drop_path < 1, "network.drop_path", "lie in [0, 1)", self.drop_path)
        _require(
            self.aux_block <= -2, "network.aux_block", "be <= -2, a block before the last", self.aux_block
        )
        _require(self.decoder_channels > 0, "network.decoder_channels", "be > 0", self.decoder_channels)
        _require(self.decoder_dilation > 0, "network.decoder_dilation", "be > 0", self.decoder_dilation)
        _require(
            not (self.pretrained and self.weights),
            "network.pretrained",
            "be false where network.weights names a file",
            self.pretrained,
        )


@dataclass(frozen=True, kw_only=True)
class CamConfig:
    """How AN's maps of one image are fused before they become pseudo-labels."""

    scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    """Scales of the weak view that AN sees, each in (0, 4]."""
    flip: bool = True
    """Whether AN sees each scale flipped, too."""
    stride: int = 1
    """Pixels of the crop per pixel of the pseudo-labels; 1 is the crop's own resolution."""
    source: Literal["assignment", "online"] = "assignment"
    """Network whose CPL and SPL supervise ON: `assignment` swaps assignments (SA), `online` does not."""

    def __post_init__(self) -> None:
        _require_scales("cam.scales", self.scales)
        _require(self.stride >= 1, "cam.stride", "be >= 1", self.stride)


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """The confidence threshold xi that splits foreground from background (Eq. 3 and 6)."""

    mode: Literal["dynamic", "fixed"] = "dynamic"
    """`dynamic` searches xi by Eq. 6 (DT), `fixed` keeps `xi`."""
    xi: float = 0.45
    """The fixed threshold, and where the dynamic one starts while its queue fills, in (0, 1)."""
    queue: int = 100
    """Batches whose activations the two Gaussians are fitted to, >= 1."""
    min_activation: float = 0.05
    """Activations up to this value are left out of the fit, in [0, 1); negative lets all pixels in."""
    min_std: float = 0.1
    """Least standard deviation of the two Gaussians, in (0, 0.5]; keeps them off the CAMs' spikes."""

    def __post_init__(self) -> None:
        _require(0 < self.xi < 1, "threshold.xi", "lie in (0, 1)", self.xi)
        _require(self.queue >= 1, "threshold.queue", "be >= 1", self.queue)
        _require(self.min_activation < 1, "threshold.min_activation", "be < 1", self.min_activation)
        _require(0 < self.min_std <= 0.5, "threshold.min_std", "lie in (0, 0.5]", self.min_std)


@dataclass(frozen=True, kw_only=True)
class RawConfig:
    """Perplexity and the reliability-based adaptive weighting of c2s (Eq. 4 and 5)."""

    enabled: bool = True
    """Weight c2s by reliability (RAW); off gives plain cross-entropy."""
    alpha: float = 0.8
    """lambda_alpha of Eq. 4: -log(alpha) is the smallest perplexity; in (0, 1]."""
    beta: float = 1.0
    """lambda_beta of Eq. 4: exponent of the perplexity, > 0."""

    def __post_init__(self) -> None:
        _require(0 < self.alpha <= 1, "raw.alpha", "lie in (0, 1]", self.alpha)
        _require(0 < self.beta < math.inf, "raw.beta", "be finite and > 0", self.beta)


@dataclass(frozen=True, kw_only=True)
class C2sConfig:
    """CAM pseudo-labels supervise the segmentation (Eq. 5)."""

    weight: float = 0.1
    """lambda_c2s of Eq. 11, for both CAM heads, >= 0; 0 leaves the term out."""
    aux: bool = True
    """Whether M-dagger's CPL supervise the segmentation, too (the second c2s term of Eq. 11)."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight < math.inf, "c2s.weight", "be finite and >= 0", self.weight)


@dataclass(frozen=True, kw_only=True)
class S2cConfig:
    """Segmentation pseudo-labels guide the CAMs (GC, Eq. 7 and 8)."""

    weight: float = 0.05
    """lambda_s2c of Eq. 11, >= 0; 0 leaves the term out (no guided CAMs)."""
    tau: float = 0.01
    """Softmax temperature that sharpens the SPL (Eq. 7), > 0."""
    source: Literal["spl", "gt", "noise", "none"] = "spl"
    """What guides the CAMs (Fig. 1): the SPL, the oracle's ground-truth masks, random masks, or nothing."""
    detach: Literal["none", "features", "classifier"] = "none"
    """What of M = F W the guidance's gradient does not reach (Tab. 4a): F, W, or nothing is spared."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight < math.inf, "s2c.weight", "be finite and >= 0", self.weight)
        _require(0 < self.tau < math.inf, "s2c.tau", "be finite and > 0", self.tau)


@dataclass(frozen=True, kw_only=True)
class CscConfig:
    """Contrastive separation in CAMs (CSC, Eq. 9 and 10)."""

    weight: float = 0.1
    """lambda_csc of Eq. 11, >= 0; 0 leaves the term out."""
    epsilon: float = 1.0
    """Largest perplexity of a pixel that is contrasted, > 0; `inf` contrasts all."""
    tau: float = 0.5
    """InfoNCE temperature on the cosine similarity of class-activation vectors, > 0."""
    max_anchors: int = 1024
    """Most positions contrasted per image, drawn at random; bounds memory at its square."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight < math.inf, "csc.weight", "be finite and >= 0", self.weight)
        _require(self.epsilon > 0, "csc.epsilon", "be > 0", self.epsilon)
        _require(0 < self.tau < math.inf, "csc.tau", "be finite and > 0", self.tau)
        _require(self.max_anchors >= 2, "csc.max_anchors", "be >= 2", self.max_anchors)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How AN follows ON."""

    momentum: float = 0.9994
    """m of AN <- m AN + (1 - m) ON after every step, in [0, 1]; 1 freezes AN."""

    def __post_init__(self) -> None:
        _require(0 <= self.momentum <= 1, "ema.momentum", "lie in [0, 1]", self.momentum)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and polynomial decay."""

    lr: float = 6e-5
    """Peak learning rate of the encoder, > 0."""
    head_lr_scale: float = 10.0
    """Factor on the learning rate of the CAM heads and the decoder, > 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay, >= 0; not applied to biases and norms."""
    beta1: float = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    beta2: float = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    lr_warmup: int = 1500
    """Iterations over which the learning rate rises linearly from 0, >= 0."""
    power: float = 0.9
    """Exponent of the polynomial decay to 0, >= 0."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", "be finite and > 0", self.lr)
        _require(
            0 < self.head_lr_scale < math.inf, "optim.head_lr_scale", "be finite and > 0", self.head_lr_scale
        )
        _require(
            0 <= self.weight_decay < math.inf, "optim.weight_decay", "be finite and >= 0", self.weight_decay
        )
        _require(0 <= self.beta1 < 1, "optim.beta1", "lie in [0, 1)", self.beta1)
        _require(0 <= self.beta2 < 1, "optim.beta2", "lie in [0, 1)", self.beta2)
        _require(self.lr_warmup >= 0, "optim.lr_warmup", "be >= 0 iterations", self.lr_warmup)
        _require(0 <= self.power < math.inf, "optim.power", "be finite and >= 0", self.power)
        _require(0 <= self.clip_norm < math.inf, "optim.clip_norm", "be finite and >= 0", self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The schedule of one run and how it computes."""

    seed: int = 0
    """Seed of initial heads, data order, augmentations and anchors, >= 0."""
    iterations: int = 20_000
    """Optimiser steps in all, >= 1."""
    warmup: int = 6_000
    """Steps of classification alone before co-training starts, in [0, iterations]."""
    batch_size: int = 2
    """Images per step over all workers together: the result does not depend on how many share it."""
    accumulate: int = 1
    """Micro-batches each worker splits its share of a batch into, to save memory, >= 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` computes the networks in bfloat16 autocast; losses and weights stay in fp32."""
    compile: bool = False
    """Compile the networks with torch.compile: pays off on GPUs and long runs."""
    log_every: int = 50
    """Steps between two lines of progress and metrics, >= 1."""
    checkpoint_every: int = 1_000
    """Steps between two whole-state checkpoints, >= 1."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk, >= 1."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "train.seed", "lie in [0, 2**32)", self.seed)
        for name in (
            "iterations",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", "be >= 1", getattr(self, name))
        _require(
            0 <= self.warmup <= self.iterations,
            "train.warmup",
            f"lie in [0, train.iterations] = [0, {self.iterations}]",
            self.warmup,
        )
        _require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            f"divide train.batch_size = {self.batch_size}",
            self.accumulate,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a network is judged; never changes what is trained."""

    every: int = 2_000
    """Steps between two evaluations, >= 1; one more follows the last step."""
    size: int = 448
    """Side of the square that images are resized to before inference, pixels; a multiple of the patch."""
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 0.75, 1.25)
    """Scales whose predictions are averaged, each in (0, 4]."""
    flip: bool = True
    """Whether each scale is also predicted flipped."""
    batch_size: int = 8
    """Images per forward pass of the evaluation."""
    max_images: int = 0
    """Most images of the split that are evaluated, from its start; 0 takes all."""
    xi: float = 0.5
    """Threshold at which CPL quality is reported (paper Tables 1 and 4), in (0, 1)."""
    coexistence: tuple[str, ...] = ("bird", "train", "aeroplane", "boat")
    """Classes that C-mIoU averages: those that suffer from coexistence."""
    train_split: str = ""
    """List of training images whose CPL are judged after the last step (Tab. 1, 4a); empty judges none."""
    crf: bool = False
    """Whether segmentation is judged after a dense CRF, too (Tab. 6); needs the extra `crf`."""
    panel_images: int = 6
    """Images shown in the picture panel of every evaluation; 0 draws none."""
    panel_choice: Literal["random", "coexistence", "first"] = "random"
    """Which images: drawn by `panel_seed`, of those with a class of `coexistence` alone, or the first."""
    panel_seed: int = 0
    """Seed that draws the panel's images, >= 0."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "evaluation.every", "be >= 1", self.every)
        _require(self.size > 0, "evaluation.size", "be > 0 pixels", self.size)
        _require_scales("evaluation.scales", self.scales)
        _require(self.batch_size >= 1, "evaluation.batch_size", "be >= 1", self.batch_size)
        _require(self.max_images >= 0, "evaluation.max_images", "be >= 0", self.max_images)
        _require(0 < self.xi < 1, "evaluation.xi", "lie in (0, 1)", self.xi)
        _require(self.panel_images >= 0, "evaluation.panel_images", "be >= 0", self.panel_images)
        _require(self.panel_seed >= 0, "evaluation.panel_seed", "be >= 0", self.panel_seed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run of CoSA. The defaults are the paper's setting for PASCAL VOC 2012."""

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    cam: CamConfig = field(default_factory=CamConfig)
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    raw: RawConfig = field(default_factory=RawConfig)
    c2s: C2sConfig = field(default_factory=C2sConfig)
    s2c: S2cConfig = field(default_factory=S2cConfig)
    csc: CscConfig = field(default_factory=CscConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def guided(self) -> bool:
        """Whether s2c is trained at all: it has a weight and a source."""
        return self.s2c.weight > 0 and self.s2c.source != "none"

    @property
    def oracle(self) -> bool:
        """Whether training sees ground-truth masks, which weak supervision must not."""
        return self.guided and self.s2c.source == "gt"


# Settings that say where and how often, not what: two runs that differ only here are the same run.
MACHINE_FIELDS = frozenset(
    {
        "data.root",
        "data.archive",
        "data.archive_sha256",
        "data.cache",
        "data.loader_workers",
        "train.compile",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "evaluation.batch_size",
        "evaluation.panel_images",
        "evaluation.panel_choice",
        "evaluation.panel_seed",
    }
)

# Sections that act only once co-training has begun: runs that differ only here share their warm-up.
COTRAINING_SECTIONS = frozenset({"cam", "threshold", "raw", "c2s", "s2c", "csc"})


@dataclass(frozen=True)
class Field:
    """One setting of a Config, as the command line and the tables see it."""

    name: str
    """Dotted name, `csc.weight`."""
    kind: Any
    """Its type annotation, resolved."""
    default: Any
    """Its value in Config()."""
    doc: str
    """The string under the field."""


@functools.cache
def fields() -> Mapping[str, Field]:
    """Every setting by its dotted name, in the order of the sections."""
    default = Config()
    found: dict[str, Field] = {}
    for section in dataclasses.fields(Config):
        section_default = getattr(default, section.name)
        section_type = type(section_default)
        kinds = typing.get_type_hints(section_type)
        docs = _docstrings(section_type)
        for item in dataclasses.fields(section_type):
            name = f"{section.name}.{item.name}"
            value = getattr(section_default, item.name)
            found[name] = Field(name, kinds[item.name], value, docs[item.name])
    return types.MappingProxyType(found)


def _docstrings(section: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, by field."""
    module = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    body = next(n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == section.__name__)
    docs = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def flatten(config: Config) -> dict[str, Any]:
    """Every setting of `config` by its dotted name."""
    return {name: _get(config, name) for name in fields()}


def _get(config: Config, name: str) -> Any:
    section, item = name.split(".")
    return getattr(getattr(config, section), item)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with some settings changed, all checks passed again.

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
            raise ValueError(f"setting must be one that exists, got {name!r}{nearest(name, fields())}")
        section, item = name.split(".")
        by_section.setdefault(section, {})[item] = _coerce(known, value)
    sections = {
        section: dataclasses.replace(getattr(config, section), **items)
        for section, items in by_section.items()
    }
    return dataclasses.replace(config, **sections)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known name closest to `name`, or the empty string."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # `weigth` alone: look for the setting whose last part is meant
        by_tail = {full.rpartition(".")[2]: full for full in names}
        close = [by_tail[tail] for tail in difflib.get_close_matches(name, by_tail, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _coerce(known: Field, value: Any) -> Any:
    """`value` as the setting's type; text is parsed, numbers are widened, the rest must fit."""
    kind = known.kind
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(
                f"{known.name} must be one of {', '.join(choices)}, got {value!r}"
                f"{nearest(str(value), choices)}"
            )
        return value
    if origin is tuple:
        element = typing.get_args(kind)[0]
        parts = [p for p in value.split(",") if p.strip()] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise TypeError(f"{known.name} must be a list of {element.__name__}, got {value!r}")
        return tuple(_coerce_scalar(known.name, element, part) for part in parts)
    return _coerce_scalar(known.name, kind, value)


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _coerce_scalar(name: str, kind: type, value: Any) -> Any:
    wrong = TypeError(f"{name} must be {_KIND_NAMES[kind]}, got {value!r}")
    if isinstance(value, str) and kind is not str:
        text = value.strip()
        if kind is bool:
            if text.lower() not in _TRUTH:
                raise wrong
            return _TRUTH[text.lower()]
        try:
            number = float(text)
        except ValueError:
            raise wrong from None
        value = int(number) if kind is int and number.is_integer() else number
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and math.isnan(value)):
        raise wrong
    return value.strip() if isinstance(value, str) else value


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def to_json(config: Config) -> str:
    """`config` as sorted, indented JSON with dotted names; `from_json` reads it back.

    Infinity is written as the text "inf": JSON has no number for it.
    """
    values = {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in flatten(config).items()}
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"


def from_json(text: str) -> Config:
    """The Config that `to_json` wrote.

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
    return override(Config(), values)


def identity(config: Config) -> str:
    """Sixteen hex digits that two configs share exactly where they are the same experiment."""
    return _digest(_portable(config))


def warmup_identity(config: Config) -> str:
    """Sixteen hex digits that two configs share exactly where their warm-up phases are the same.

    Co-training settings and everything about evaluation stay out: the warm-up never reads them. So does the
    EMA: ON learns without AN there, and one warm-up can carry an AN for each momentum.
    """
    ignored = COTRAINING_SECTIONS | {"evaluation", "ema"}
    values = {k: v for k, v in _portable(config).items() if k.partition(".")[0] not in ignored}
    del values["data.val_split"]
    return _digest(values)


def _portable(config: Config) -> dict[str, Any]:
    """The settings that make the experiment, the same on every machine: a weights file by its name."""
    values = {k: v for k, v in flatten(config).items() if k not in MACHINE_FIELDS}
    if not config.guided:  # however the term was switched off, its other settings say nothing
        values |= {name: value for name, value in flatten(Config()).items() if name.startswith("s2c.")}
        values["s2c.weight"] = 0.0
    values["network.weights"] = PurePath(config.network.weights).name
    return values


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def difference(before: Config, after: Config) -> Iterator[tuple[str, Any, Any]]:
    """Settings in which two configs differ, as (dotted name, value before, value after)."""
    old, new = flatten(before), flatten(after)
    return ((name, old[name], new[name]) for name in old if old[name] != new[name])
