"""The form in which MLflow loads and serves an exported model: `mlflow.pyfunc.load_model(FOLDER)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cosa.model import Model, Picture, load_model


class Predictor:
    """A model behind the one method that MLflow calls."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Any) -> list[UInt8[np.ndarray, "_h _w"]]:
        """The class of each pixel of each image, as `Model.predict`.

        Args:
            model_input: A data frame whose first column names image files, a list of what `Model.predict`
                takes, or one uint8 array (images, height, width, 3).
        """
        images: list[Picture] = list(model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input)
        return [self.model.predict(image) for image in images]


def _load_pyfunc(path: str) -> Predictor:
    """Called by MLflow, by this name, with the folder that `export` put the model in."""
    return Predictor(load_model(Path(path)))
