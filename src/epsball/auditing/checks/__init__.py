"""The audit's doubt: what has to hold if its numbers are to be believed, each checked on a small sample.

Samples are capped, so doubt gets cheaper the more is audited. At the default effort all checks of a round ask about 29,000
forward rows, and never more than about 39,000, however many samples there are; a third is for `effort_suffices`. AutoAttack asks about
7,800 for each sample that stands. What a check brings about, a search of all that stand, comes on top.
"""

from epsball.auditing.checks.binarize import planted_inputs_are_found
from epsball.auditing.checks.contract import answers_in_one_pass, classes_suffice
from epsball.auditing.checks.effort import effort_suffices, harder, losses_agree, queries_suffice
from epsball.auditing.checks.limits import floor_is_reached, radius_means_something, rounding_matters
from epsball.auditing.checks.masking import (
    black_box_finds_nothing,
    noise_finds_nothing,
    one_step_finds_nothing,
    severity,
    transfer_finds_nothing,
)
from epsball.auditing.checks.scene import Check, Scene, attack_row, told_once
from epsball.auditing.checks.search import curve_falls, edge_is_reached, freedom_suffices, search_has_ended
from epsball.auditing.checks.surface import gradients_tell, promises_are_kept, scores_are_steady

ROUND_CHECKS: tuple[Check, ...] = (
    losses_agree,
    radius_means_something,
    floor_is_reached,
    gradients_tell,
    scores_are_steady,
    promises_are_kept,
    edge_is_reached,
    one_step_finds_nothing,
    noise_finds_nothing,
    black_box_finds_nothing,
    search_has_ended,
)
"""Run after the attacks of each threat and radius."""

FINAL_CHECKS: tuple[Check, ...] = (freedom_suffices, curve_falls, planted_inputs_are_found)
"""Run once per threat after its last radius."""

CONTRACT_CHECKS = (answers_in_one_pass, classes_suffice)
"""Run in the preflight: (Bench) -> findings."""

__all__ = [
    "CONTRACT_CHECKS",
    "FINAL_CHECKS",
    "ROUND_CHECKS",
    "Check",
    "Scene",
    "attack_row",
    "effort_suffices",
    "harder",
    "losses_agree",
    "queries_suffice",
    "rounding_matters",
    "severity",
    "told_once",
    "transfer_finds_nothing",
]
