"""CoSA: weakly supervised co-training with swapping assignments, one training run of it.

`import cosa` costs nothing: torch, timm, Ray and MLflow are imported by the rooms that need them.
"""

__version__ = "0.1.0"
