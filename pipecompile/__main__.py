"""``python -m pipecompile`` is the command line, so that torchrun can start it."""

import sys

from pipecompile.cli import main

sys.exit(main())
