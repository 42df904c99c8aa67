"""Pages and tables that people look at: one run's report, and any number of runs side by side."""

from llmprune.visual.comparison import Comparison, RunRow, compare
from llmprune.visual.comparison_page import write_comparison
from llmprune.visual.report_page import write_report

__all__ = ["Comparison", "RunRow", "compare", "write_comparison", "write_report"]
