"""``python -m nasdet`` is the same as ``nasdet``."""

from nasdet.cli import main

raise SystemExit(main())
