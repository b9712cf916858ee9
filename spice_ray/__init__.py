"""SPICE (Semantic Pseudo-Labeling for Image Clustering) on Ray: unlabelled images in, clusters out."""

from spice_ray.workflow import cluster

__all__ = ["cluster"]
__version__ = "0.1.0"
