"""MAE and SWAG models of their own repositories, as stand-ins with their structure, keep the promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from helpers import randomised
from promises import Family, check_promises
from tokenmerge.testing.models.plain import MAEStandIn, SwagStandIn

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mae-global-pool": lambda: MAEStandIn(patch_size=4),
    "mae-class-token": lambda: MAEStandIn(patch_size=4, global_pool=False),
    "swag-class-token": lambda: SwagStandIn(patch_size=4),
    "swag-gap": lambda: SwagStandIn(patch_size=4, classifier="gap"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stand_in_keeps_the_promises(name: str) -> None:
    family = Family("MAE and SWAG of their own repositories (stand-ins)", name)
    model = randomised(MODELS[name]()).eval().double()
    check_promises(model, torch.randn(2, 3, 32, 32).double(), family=family)
