"""Trackers: what a run tells and to whom. The only place that imports wandb and TensorBoard."""

from vip.tracking.base import Fanout, Record, Tracker, TrackingConfig, View

__all__ = ["Fanout", "Record", "Tracker", "TrackingConfig", "View"]
