"""``python -m dist_ckpt_mistral``."""

import sys

from dist_ckpt_mistral.cli import main

sys.exit(main())
