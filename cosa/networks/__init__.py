"""The networks: a ViT encoder, the CAM heads and the segmentation decoder on it, and how AN follows ON."""
