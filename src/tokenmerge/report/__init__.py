"""How results are said: tables with typed columns, plots, progress, a journal that survives, and a model's report."""

from tokenmerge.report.summary import Calibration, Candidate, Report

__all__ = ["Calibration", "Candidate", "Report"]
