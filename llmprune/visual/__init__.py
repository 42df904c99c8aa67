"""Pages and tables that people look at: one run's report, and any number of runs side by side."""

from llmprune.visual.comparison import Comparison, RunRow, compare
from llmprune.visual.comparison_page import write_comparison
from llmprune.visual.page import PlottingError, plotly_installed
from llmprune.visual.report_page import summary_html, write_page, write_report

__all__ = [
    "Comparison", "PlottingError", "RunRow", "compare", "plotly_installed", "summary_html",
    "write_comparison", "write_page", "write_report",
]  # fmt: skip
