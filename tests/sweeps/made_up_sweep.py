"""A sweep that was never trained: plan, runs and a store that answers from memory, for the figures' tests."""

from __future__ import annotations

import functools
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import torch

from cosa.config import Config, TrainConfig, override
from cosa.evaluation.panels import COLUMNS, PanelRow, panel_arrays
from cosa.evaluation.pictures import sheet
from sweeps.planning import plan as planning
from sweeps.planning.plan import make_plan
from sweeps.reporting.histories import Histories

BASE = override(
    Config(train=TrainConfig(iterations=2000, warmup=400)), {"evaluation.coexistence": ("boat", "train")}
)
STEPS = (200, 400, 800, 1200, 1600, 2000)
CONFIDENCE = [round(i / 50, 2) for i in range(51)]
PERPLEXITY = [round(i / 5, 1) for i in range(26)]


class Store:
    """What histories ask of MLflow's client, answered from memory; it notes what was downloaded."""

    def __init__(self):
        self.metrics = {}
        self.files = {}  # by run and path what makes the file's bytes, when it is asked for
        self.downloads = []

    def get_metric_history(self, run_id, key):
        return [SimpleNamespace(step=s, value=v) for s, v in self.metrics.get(run_id, {}).get(key, ())]

    def list_artifacts(self, run_id, path=None):
        names = sorted(self.files.get(run_id, {}))
        return [SimpleNamespace(path=name) for name in names if name.startswith(f"{path}/")]

    def download_artifacts(self, run_id, path, folder):
        from pathlib import Path

        self.downloads.append((run_id, path))
        file = Path(folder) / Path(path).name
        file.write_bytes(self.files[run_id][path]())
        return str(file)


def histogram(values, right, edges, last_open=False):
    """What an analysis file keeps of pixels; `right` says which of them are."""
    bounds = np.array([*edges, math.inf] if last_open else edges)
    return {
        "edges": [*edges, None] if last_open else list(edges),
        "pixels": np.histogram(values, bounds)[0].tolist(),
        "correct": np.histogram(values[right], bounds)[0].tolist(),
    }


def images(iou, perplexity):
    """What an analysis file keeps of single images."""
    distance = (np.abs(1 - iou) + perplexity) / 2
    return {
        "iou": {"edges": CONFIDENCE, "count": np.histogram(iou, CONFIDENCE)[0].tolist()},
        **{
            name: {
                "edges": [*PERPLEXITY, None],
                "count": np.histogram(values, [*PERPLEXITY, math.inf])[0].tolist(),
            }
            for name, values in (("perplexity", perplexity), ("distance", distance))
        },
    }


def analysis(step, *, quality=0.6, seed=0, pixels=20_000):
    """An analysis file: confidences in two groups, accuracy that grows with the distance to xi."""
    generator = np.random.default_rng([seed, step])
    xi = 0.45 - 0.1 * math.exp(-step / 600)
    low, high = generator.beta(1.2, 6, pixels // 2), generator.beta(6, 2, pixels - pixels // 2)
    nu = np.concatenate([low, high, np.zeros(pixels // 4)])
    nu = nu[(nu < 0.7) | (nu > 0.74)]  # a gap: bins without a pixel
    distance = np.where(nu >= xi, (nu - xi) / (1 - xi), (xi - nu) / xi)
    right = generator.random(len(nu)) < 0.5 + (0.2 + 0.25 * step / 2000) * distance
    perplexity = -np.log(0.8 * np.clip(distance, 1e-6, 1))
    judged = {
        "confidence": histogram(nu, right, CONFIDENCE),
        "perplexity": histogram(perplexity, right, PERPLEXITY, last_open=True),
    }
    single = images(
        np.clip(generator.normal(quality, 0.15, 300), 0, 1), generator.gamma(4, 0.25 / quality, 300)
    )
    network = {"cam": judged, "aux_cam": judged, "images": single}
    return {
        "step": step,
        "xi": xi,
        "aux_xi": xi - 0.05,
        "epsilon": 1.0,
        "networks": {"assignment": network, "online": network},
    }


CLASSES = ("boat", "train")


def panel_rows(seed=0, rows=2):
    """What a picture panel shows; its images are the same for every `seed`."""
    own = torch.Generator().manual_seed(seed)
    size = (40, 60)
    yy, xx = np.mgrid[: size[0], : size[1]]
    pictures = []
    for index in range(rows):
        image = np.stack([xx * 4, yy * 5, np.full_like(xx, 60 * index)], -1).astype(np.uint8)
        maps = torch.rand(2, 4, 6, generator=own).repeat_interleave(10, 1).repeat_interleave(10, 2)
        label = maps.argmax(0) + 1
        truth = torch.from_numpy((xx > 20).astype(np.int64))
        pictures.append(
            PanelRow(
                name=f"image_{index}",
                labels=torch.tensor([1.0, 1.0]),
                image=image,
                activations=torch.stack([maps, maps]),
                class_maps=torch.stack([truth, label, label, label]),
            )
        )
    return pictures


def panel_picture(seed):
    """A panel as the bytes of a PNG."""
    data = io.BytesIO()
    arrays = panel_arrays(panel_rows(seed), CLASSES)
    sheet(arrays["tiles"], titles=COLUMNS, legends=arrays["legends"]).save(data, format="PNG")
    return data.getvalue()


def panel_file(seed, network="assignment"):
    """A panel's arrays as the bytes of a file."""
    data = io.BytesIO()
    np.savez_compressed(data, **panel_arrays(panel_rows(seed), CLASSES, network))
    return data.getvalue()


def analysis_file(step, **settings):
    """An analysis file's bytes."""
    return json.dumps(analysis(step, **settings)).encode()


def made_up(tables, seeds=(0, 1), *, missing=(), running=()):
    """Store and histories of a sweep: the arms `missing` have no run, that of those `running` is open."""
    plan = make_plan(BASE, tables, seeds)
    store = Store()
    runs = []
    for number, trial in enumerate(plan.trials):
        arms = {arm.partition("/")[2] for arm in trial.arms} if trial.kind == "trial" else set()
        if arms & set(missing):
            continue
        run_id = f"run{number}"
        steps = [s for s in STEPS if trial.first_step < s <= trial.last_step]
        fill(store, run_id, trial, steps)
        tag = "cosa.warmup_identity" if trial.kind == "warmup" else "cosa.identity"
        tags = {"cosa.kind": trial.kind, tag: trial.identity}
        runs.append(
            SimpleNamespace(
                info=SimpleNamespace(run_id=run_id, status="RUNNING" if arms & set(running) else "FINISHED"),
                data=SimpleNamespace(tags=tags),
            )
        )
    return store, Histories(store, json.loads(planning.to_json(plan)), runs, "made-up")


def fill(store, run_id, trial, steps):
    """Metrics, analysis files and a panel of one run: better the more components its arm has."""
    config = trial.config
    generator = np.random.default_rng([trial.seed, len(trial.arms[0])])
    quality = 0.62 - 0.04 * (config.cam.source == "online") - 0.05 * (not config.raw.enabled)
    quality -= 0.06 * (config.csc.weight == 0) + 0.3 * (config.threshold.xi - 0.45) ** 2
    quality += {"gt": 0.08, "noise": -0.25}.get(config.s2c.source, 0) - 0.05 * (not config.guided)

    def curve(top):
        return [(s, top - 0.25 * math.exp(-s / 500) + 0.008 * generator.normal()) for s in steps]

    metrics = store.metrics[run_id] = {}
    for network, gain in (("assignment", 0.0), ("online", -0.02)):
        metrics |= {
            f"val/{network}/cpl_miou": curve(quality + gain),
            f"val/{network}/seg_miou_labelled": curve(quality + 0.03 + gain),
            f"val/{network}/aux_cpl_miou": curve(quality + gain - 0.1),
            f"val/{network}/cpl_miou_sure": curve(quality + gain + 0.1),
            f"val/{network}/aux_cpl_miou_sure": curve(quality + gain + 0.15),
            f"val/{network}/cls_precision": [(s, 0.97 + 0.01 * generator.random()) for s in steps],
            f"val/{network}/cpl_perplexity": [(s, 1.9 - v) for s, v in curve(quality)],
        }
    if trial.kind == "trial":
        logged = range(max(trial.first_step, config.train.warmup) + 50, trial.last_step + 1, 50)
        for key, level in (("train/threshold", 0.45), ("train/aux_threshold", 0.38)):
            metrics[key] = [
                (s, level - 0.15 * math.exp(-(s - 400) / 300) + 0.01 * generator.normal()) for s in logged
            ]
    files = store.files[run_id] = {}
    for step in steps:
        files[f"analysis/step_{step:08d}.json"] = functools.partial(
            analysis_file, step, quality=quality, seed=trial.seed
        )
        panel = f"panels/step_{step:08d}"
        files[f"{panel}.png"] = functools.partial(panel_picture, len(trial.arms[0]))
        files[f"{panel}.npz"] = functools.partial(panel_file, len(trial.arms[0]), config.cam.source)
