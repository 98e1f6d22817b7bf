"""Present results: tables with typed columns, plots, progress, a resumable journal, and the report of a model."""

from tokenmerge.report.summary import Calibration, Candidate, Report

__all__ = ["Calibration", "Candidate", "Report"]
