"""Makes the fuzzers' own modules importable, as running ``fuzz.py`` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
