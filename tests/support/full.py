"""Whether every case is to be run of what a normal run only samples: ``make test-full``."""

import os

FULL = os.environ.get("TRAINSTEP_FULL", "") not in ("", "0")
