"""`GET /`: one page that needs nothing else; what it shows comes from /v1/status, with the token that is typed into it."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("status.html").read_bytes()


def _hash_of(tag: str) -> str:
    [content] = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""The page's own script and style run, and nothing that somebody may have smuggled into it."""
