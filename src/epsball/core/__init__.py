"""The vocabulary and the one loop: imports torch and nothing of ours but the errors."""

from epsball.core.attack import Attack, AttackLike, Model
from epsball.core.descent import Descent, Strategy
from epsball.core.goal import Aimed, Goal, LabelsChanged, Targeted, Untargeted, as_goal, valid
from epsball.core.gradient import Gradient, autograd
from epsball.core.outcome import Outcome
from epsball.core.problem import Drop, Objective, Problem, Reading, Watch
from epsball.core.random import Key, content_ids
from epsball.core.rule import Chain, Momentum, Rule, Steepest, Unit, chain
from epsball.core.run import run
from epsball.core.sources import Eot, Near, Through, Transform
from epsball.core.stepsize import Fading, Fixed, Halving, OfRadius, StepSize
from epsball.core.threat import Projects, Threat
from epsball.core.victim import Access, Tally, Victim

__all__ = [
    "Access",
    "Aimed",
    "Attack",
    "AttackLike",
    "Chain",
    "Descent",
    "Drop",
    "Eot",
    "Fading",
    "Fixed",
    "Goal",
    "Gradient",
    "Halving",
    "Key",
    "LabelsChanged",
    "Model",
    "Momentum",
    "Near",
    "Objective",
    "OfRadius",
    "Outcome",
    "Problem",
    "Projects",
    "Reading",
    "Rule",
    "Steepest",
    "StepSize",
    "Strategy",
    "Tally",
    "Targeted",
    "Threat",
    "Through",
    "Transform",
    "Unit",
    "Untargeted",
    "Victim",
    "Watch",
    "as_goal",
    "autograd",
    "chain",
    "content_ids",
    "run",
    "valid",
]
