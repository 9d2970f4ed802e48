"""Tables, figures and the HTML report of a comparison, made from its raw records. Nothing here imports torch."""

from torchive.report.html import render_report

__all__ = ["render_report"]
