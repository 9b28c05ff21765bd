"""``python -m trainer.cli`` is ``trainstep``."""

import sys

from trainer.cli.entry import main

sys.exit(main())
