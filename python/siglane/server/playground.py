"""The page at `/`: one document, which asks this server alone."""

from __future__ import annotations

import base64
from hashlib import sha256
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

PATH = "/"


def add_playground(app: FastAPI) -> None:
    page, policy = assemble()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    @app.get(PATH, include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers=headers)


def assemble() -> tuple[str, str]:
    """The page with its style and script inside, and the policy that lets a browser load nothing else."""
    folder = files("siglane.server") / "playground"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page = (folder / "page.html").read_text(encoding="utf-8")
    page = page.replace("/* page.css */", style).replace("/* page.js */", script)
    return page, "; ".join(
        (
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "connect-src 'self'",
            "img-src 'self' data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash(text: str) -> str:
    """Of the text between its tags, as browsers compare it."""
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
