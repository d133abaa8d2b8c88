"""Trackers: what a run tells and to whom. The only place that imports wandb."""

from vip.tracking.base import Fanout, Record, Tracker

__all__ = ["Fanout", "Record", "Tracker"]
