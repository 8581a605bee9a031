"""How long the fuzzer runs: the same 400 cases in `make test-slow`; others in `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "stateful_step_count": 20,
}
settings.register_profile("slow", max_examples=400, derandomize=True, database=None, **COMMON)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("FUZZ_CASES", "10000")), print_blob=True, **COMMON
)
settings.load_profile("fuzz" if "FUZZ_CASES" in os.environ else "slow")
