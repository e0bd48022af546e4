"""A plan carried out on Ray Tune: resumable at every point, recorded in MLflow."""
