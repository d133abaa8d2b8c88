"""Secrets out of what is saved and shown: a configuration's values that look like keys, passwords or tokens."""

import re
from typing import Any

REDACTED = "<redacted>"
SECRET_KEY = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)
SECRETS = re.compile(
    r"(?<=://)(?:[^\s/:@]*:\S*|[^\s/@]+)(?=@)"  # user:password@host, token@host
    r"|(?i:(?<=[?&])[\w-]*(?:token|secret|passw|key|sig)[\w-]*=[^&\s]+)"  # a signed URL's query
    r"|(?<![0-9A-Za-z])(?:[0-9a-f]{40}|wandb_v\d_\w{20,}"  # W&B, the second one since 2025
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|hf_\w{20,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|AIza[\w-]{35}|eyJ[\w-]+\.[\w-]+\.[\w-]+)(?![0-9A-Za-z])"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY[\s\S]*"
)


def redact(node: Any, key: str = "") -> Any:
    """A tree of dicts, lists and values with every secret replaced: the whole value under a key like `*token*`, else the part."""
    if isinstance(node, dict):
        return {name: redact(value, str(name)) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [redact(value, key) for value in node]
    if node is not None and SECRET_KEY.search(key):
        return REDACTED
    return SECRETS.sub(REDACTED, node) if isinstance(node, str) else node
