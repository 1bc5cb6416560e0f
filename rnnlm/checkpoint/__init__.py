"""Tensors to files and back, durably; knows neither model nor optimizer, and imports from the ground floor alone.

The order: safetensors_file, manifest, checkpoint, saver.
"""
