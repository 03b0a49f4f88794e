"""``python -m peft_perta`` runs ``peft-perta``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
