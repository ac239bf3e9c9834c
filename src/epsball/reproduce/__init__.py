"""Figures of published papers, measured again with this library: one experiment a function, one table each.

`epsball reproduce` lists them; `epsball reproduce NAME` runs one and writes its table and figures. A new experiment is a
function under `@experiment(...)` in a file of this folder; nothing else has to know it.
"""

from epsball.reproduce.base import EXPERIMENTS, Experiment, Figure, Finding, Line, Setting, experiment, experiments, run

__all__ = ["EXPERIMENTS", "Experiment", "Figure", "Finding", "Line", "Setting", "experiment", "experiments", "run"]
