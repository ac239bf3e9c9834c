"""Data in: arrays, archives, folders and tables, brought to one form with a sentence for each change."""

from epsball.data.load import Dataset, from_arrays, load_data

__all__ = ["Dataset", "from_arrays", "load_data"]
