"""MLflow's runs as the paper's tables and figures, ours beside the published values."""
