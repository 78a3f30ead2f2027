"""Every test that asks for `case` runs over the table of geometries."""

from __future__ import annotations

import pytest
from conv_cases import CASES, Case


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]
