"""One self-contained HTML page per run, made only from the files of the run folder.

``write_report`` makes the page; ``nasdet.report.draw`` is the one place that draws boxes on pictures. Pillow and
matplotlib are imported only while a page that needs them is made.
"""

from __future__ import annotations

from nasdet.report.page import write_report

__all__ = ["write_report"]
