"""A trained network judged and applied: metrics, CRF, pictures, class maps of any images."""
