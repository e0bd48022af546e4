"""Hyper-parameter search with Optuna, beyond the paper's grid."""
