"""The paper's equations as pure functions of tensors and scalars: they import torch and `structures` alone.

    Eq. 1, 5, 8-10   losses          one function per term
    Alg. 1           cam             fusion over scales and flips, filtering, normalisation
    Eq. 3, 7         pseudo_labels   CPL and SPL
    Eq. 4            reliability     perplexity, and RAW
    Eq. 6            threshold       the search of two Gaussians, and its state

Eq. 2 and 11 are on one page in `cosa.training.swap`.
"""
