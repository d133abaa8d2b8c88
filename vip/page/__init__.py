"""The report of a run as one page: `write_report` reads run folders and writes HTML that opens from disk, without a network.

It knows the files of a run folder and nothing else of ours.
"""

from vip.page.report import write_report

__all__ = ["write_report"]
