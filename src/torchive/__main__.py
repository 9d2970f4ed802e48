"""``python -m torchive`` is ``torchive``; so is ``torchrun --nproc-per-node 2 -m torchive``, in two processes."""

import sys

from torchive.cli import main

if __name__ == "__main__":
    sys.exit(main())
