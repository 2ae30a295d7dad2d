"""``python -m mmlong`` is ``mmlong``; Lightning starts further ranks this way."""

from __future__ import annotations

import sys

from mmlong.cli import main

if __name__ == "__main__":
    sys.exit(main())
