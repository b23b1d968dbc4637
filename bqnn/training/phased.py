"""A network on its way through the three phases: when it becomes a Bayes network, and by which arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bqnn.bayes.convert import convert, convert_
from bqnn.bayes.layers import bayes_layers
from bqnn.training.phases import DETERMINISTIC, FULL_PRECISION, enter_phase, use_estimators
from bqnn.training.plan import Plan


def conversion_of(net: nn.Module, num_levels: int | None, options: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The arguments of the conversion of ``net``.

    Raises:
        TypeError, ValueError: there are arguments for a network that has Bayes layers, or the conversion, which would
            come after a phase, will fail.
    """
    if bayes_layers(net):
        given = [name for name, value in (("num_levels", num_levels), *options.items()) if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} can't be given for a net that has Bayes layers already")
        return {}
    conversion = {**options, **({} if num_levels is None else {"num_levels": num_levels})}
    if plan.phases[FULL_PRECISION].epochs:
        convert(net, **conversion)
    return conversion


class PhasedNetwork:
    """A network and the phases that it goes through, each entered once and in their order, those without epochs too.

    Attributes:
        net: the network, which is changed in place, or, where it is a layer, replaced.
        estimators: by the name of each Bayes layer, its estimator in the phase BAYES; empty before the conversion.
    """

    def __init__(self, net: nn.Module, plan: Plan, conversion: Mapping[str, Any]) -> None:
        self.net, self._plan, self._conversion = net, plan, conversion
        self.estimators = self._estimators()

    def _estimators(self) -> dict[str, str]:
        return {name: layer.estimator for name, layer in bayes_layers(self.net).items()}

    def convert(self) -> None:
        """Makes it a Bayes network, if it is none."""
        if not self.estimators:
            self.net = convert_(self.net, **self._conversion)
            self.estimators = self._estimators()

    def enter(self, phase: int) -> bool:
        """Makes the network what it is at the beginning of a phase; whether that changes it."""
        skips_deterministic = not self._plan.phases[DETERMINISTIC].epochs
        if phase == FULL_PRECISION or (phase == DETERMINISTIC and skips_deterministic):
            return False
        if self.estimators and skips_deterministic:
            return False  # to go on with the posterior that the network came with
        self.convert()
        enter_phase(self.net, phase, self.estimators)
        return True

    def resume(self, phase: int) -> None:
        """Gives a network that has been in this phase before, and has its tensors, the estimators of the phase."""
        if phase != FULL_PRECISION:
            self.convert()
            use_estimators(self.net, phase, self.estimators)
