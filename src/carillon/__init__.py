"""Carillon: a training engine for multimodal foundation models."""

__version__ = "0.1.0"
