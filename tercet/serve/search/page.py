"""The page that searches: one file, which fetches nothing from other hosts."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final

from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from tercet.serve.endpoint import Call, Service, route

_FILE: Final = Path(__file__).with_name("page.html")


def routes(service: Service) -> list[Route]:
    """Return the route of the page, which holds no secrets and asks for the key itself."""
    return [route(service, "/", page, method="GET", is_open=True)]


async def page(call: Call) -> Response:
    """Return the page that searches, compares two texts and shows the state of the server."""
    content, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(content, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """Return the page, and a policy that lets it run its own style and script and nothing else."""
    content = _FILE.read_text(encoding="utf-8")
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:"]
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    rules += ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return content, "; ".join(rules)
