"""What a run keeps on disk or behind a URL: checkpoints, its folder, exported models."""
