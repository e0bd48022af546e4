"""One training run on torch.distributed; knows no Ray, no MLflow, no command line."""
