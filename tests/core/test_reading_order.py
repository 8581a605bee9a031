"""One step reads from top to bottom: few calls, few files, few changes of file."""

import pytest
from support.count_calls import PACKAGE, warm_step_calls

from mechanic_fused import MechanicAdamW, backends


@pytest.mark.skipif(
    "cpp" not in [row.name for row in backends.table() if row.available], reason="cpp"
)
def test_a_warm_step_walks_through_few_functions_and_files():
    calls = warm_step_calls(lambda weights: MechanicAdamW(weights, lr=1.0, backend="cpp"), PACKAGE)
    assert len(calls.sequence) <= 40
    assert len(calls.files) <= 6
    assert calls.changes_of_file <= 16
    assert calls.sequence[0] == ("optimizer.py", "step")
    assert ("step.py", "take_step") in calls.sequence
