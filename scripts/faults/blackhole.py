"""A server that takes connections and never answers, as a firewall or a dying proxy does, and what W&B makes of it.

python -m scripts.faults.blackhole
"""

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.faults.launch import Numbers
from vip.tracking import TrackingConfig
from vip.tracking.wandb_run import WandbTracker

FAKE_KEY = "0123456789abcdef" * 2 + "01234567"  # W&B's form, nobody's key


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """Yields the URL of a port on this machine that accepts every connection and never says a word."""
    held = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def swallow() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=swallow, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


@contextlib.contextmanager
def account(url: str) -> Iterator[None]:
    """W&B's server is `url`, with a key, within; the environment is as before afterwards."""
    before = os.environ.copy()
    os.environ.update(WANDB_BASE_URL=url, WANDB_API_KEY=FAKE_KEY)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def refusing_url() -> str:
    """The URL of a port on this machine that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def measure_delay() -> Numbers:
    """Seconds that W&B's tracker takes to start (`_start_s`) and to end (`_end_s`): offline, and online without an answer."""
    numbers: dict[str, float | str] = {}
    with black_hole() as silent_url:
        for kind, url in (("offline", silent_url), ("black_hole", silent_url), ("refused", refusing_url())):
            with account(url), tempfile.TemporaryDirectory() as folder:
                begun = time.monotonic()
                tracking = TrackingConfig("wandb", "offline" if kind == "offline" else "online", "vip")
                tracker = WandbTracker(tracking, "delay", Path(folder), {}, None)
                started = time.monotonic()
                tracker.log(1, {"train/loss": 1.0})
                tracker.close("done")
                numbers |= {f"{kind}_start_s": started - begun, f"{kind}_end_s": time.monotonic() - started}
    return numbers


if __name__ == "__main__":
    for name, seconds in measure_delay().items():
        print(f"{name} {seconds:.2f}")
