"""The experiments: the paper's tables as data, planned, run on Ray Tune, and reported from MLflow."""
