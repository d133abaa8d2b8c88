"""Weights & Biases: whether its server answers and there is a key, within 5 seconds whatever happens."""

import http.client
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from scripts.checks.row import Row, Setup

LIMIT_S = 5.0
SERVER = "https://api.wandb.ai"
OFFLINE = "the run would be recorded offline, for `wandb sync`; metrics.jsonl is whole in any case"


def wandb(setup: Setup) -> Iterator[Row]:
    """Rank 0 alone talks to it."""
    tracking = setup.run.tracking
    if tracking.kind != "wandb" or tracking.mode != "online":
        yield Row("skipped", f"tracking={tracking.kind}{' offline' if tracking.kind == 'wandb' else ''}")
        return
    if not setup.world.is_main:
        return
    parts = urlsplit(os.environ.get("WANDB_BASE_URL") or SERVER)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"WANDB_BASE_URL: no http or https address; unset it, or set it to one like {SERVER}")
    host = parts.netloc.rpartition("@")[2]  # what is before may be a password
    problem = _probe(f"{parts.scheme}://{host}")
    if problem:
        yield Row("warning", f"{host}: {problem}; {OFFLINE}", "look at the network, WANDB_BASE_URL and HTTPS_PROXY")
    else:
        yield Row("ok", f"{host} answers")
    if not os.environ.get("WANDB_API_KEY") and not _has_login(parts.hostname):
        yield Row("warning", f"no key for {host}; {OFFLINE}", "set WANDB_API_KEY, or run `wandb login`")


def _probe(url: str) -> str:
    """Why there was no answer in time, or nothing: any answer will do."""
    problems = [f"no answer within {LIMIT_S:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=LIMIT_S).close()
            problems.append("")
        except urllib.error.HTTPError:
            problems.append("")
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not isinstance(getattr(error, "reason", error), TimeoutError):
                problems.append(f"cannot be reached ({getattr(error, 'reason', error)})")

    # In a thread, because no limit of its own ends a name server's silence.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(LIMIT_S)
    return problems[-1]


def _has_login(host: str) -> bool:
    """Whether `wandb login` left a key, in the file that it writes."""
    own = os.environ.get("NETRC")
    for path in [Path(own)] if own else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
