"""What a request may make this process read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siglane.settings.media import MediaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPolicy:
    """allowed_local_root: folder whose files `file://` URLs may name, None for none; allow_http: http and https URLs;
    allow_private_addresses: also those of the own network (off: a server must not fetch from it for strangers);
    max_bytes: of one picture's file; timeout: seconds for one URL in total, name resolution included.
    """

    allowed_local_root: Path | None = None
    allow_http: bool = True
    allow_private_addresses: bool = False
    max_bytes: int = 20 * 2**20
    timeout: float = 10.0
    max_redirects: int = 3

    @classmethod
    def of(cls, config: MediaConfig) -> MediaPolicy:
        """What a server's settings allow its clients to name as a picture."""
        root = config.allowed_local_media_path
        return cls(
            allowed_local_root=None if root is None else Path(root),
            allow_http=config.allow_http_images,
            allow_private_addresses=config.allow_private_addresses,
            max_bytes=config.max_image_bytes,
            timeout=config.image_timeout,
            max_redirects=config.image_redirects,
        )


LOCAL_MEDIA = MediaPolicy(allow_private_addresses=True)  # a local caller may read what this process may
