"""Number and choice of examples: by default, every run uses the same ones; NOMIC_JAX_FUZZ=N runs N times as many.

NOMIC_JAX_FUZZ=50 python -m pytest tests/fuzz       # new examples in each run; a failure prints how to repeat it

``launch/test.sh --all`` sets it to 20.
"""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("NOMIC_JAX_FUZZ", "0"))
# A hang is a failure. The deadline is long: the first example may import a library, and CI's machines are shared.
_COMMON = {
    "deadline": 20_000,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}
settings.register_profile("fixed", derandomize=True, database=None, **_COMMON)
settings.register_profile("new", derandomize=False, print_blob=True, **_COMMON)
settings.load_profile("new" if TIMES else "fixed")
