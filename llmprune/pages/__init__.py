"""HTML pages and tables for people: the report of one run, and comparisons of several. Reads results, makes none."""

from llmprune.pages.comparison import Comparison, compare
from llmprune.pages.comparison_page import write_comparison
from llmprune.pages.report_page import write_report
from llmprune.pages.run_row import RunRow

__all__ = ["Comparison", "RunRow", "compare", "write_comparison", "write_report"]
