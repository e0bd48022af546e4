"""The paper's tables and figures, a file each, with the published values."""
