"""POST /v1/images/view: the picture that `siglane look` draws, of one that a client sends."""

from __future__ import annotations

import io

from fastapi import FastAPI, Request
from starlette.responses import Response

from siglane.look.page import draw
from siglane.look.seen import view_of
from siglane.media.item import MediaItem
from siglane.media.messages import url_item
from siglane.server.context import RequestContext, context_of
from siglane.server.fields import RequestModel
from siglane.server.openapi import OF_A_BODY, RED, examples, failures
from siglane.server.protocol import UrlOrImage, plain
from siglane.server.served import ChatModel, Served

IMAGE_VIEW = "/v1/images/view"


class ImageViewRequest(RequestModel):
    model: str | None = None
    image: UrlOrImage


async def image_view(body: ImageViewRequest, context: RequestContext, model: ChatModel) -> bytes:
    """A PNG. UserError for a picture that a chat would refuse too."""
    item, media, salt = url_item(plain(body.image), "image"), model.media, context.client.salt(None)
    media.admit([item], "image")
    await media.fetch([item], salt, context.lease)
    await media.lay_out([item])
    # the picture, its patches, and what is drawn of both
    held = item.layout.source.width * item.layout.source.height * 3 * 3
    context.lease.take(held)
    try:
        return await media.run(_drawn, item, model)
    finally:
        context.lease.give(held)


def _drawn(item: MediaItem, model: ChatModel) -> bytes:
    facts = model.processor.facts
    with model.media.pipeline.at(item):
        view = view_of(
            item, model.media.pipeline, facts, model.config.decode, name="picture", model=model.name, speaks=True
        )
    buffer = io.BytesIO()
    draw(view).save(buffer, format="PNG")
    return buffer.getvalue()


def add_view(app: FastAPI, served: Served, model: ChatModel) -> None:
    shown = examples(a_picture={"image": RED}, with_less_detail={"image": {"url": RED, "detail": "low"}})
    png = {"image/png": {"schema": {"type": "string", "format": "binary"}}}

    @app.post(
        IMAGE_VIEW,
        responses={200: {"content": png}, **failures(*OF_A_BODY)},
        response_model=None,
        response_class=Response,
        openapi_extra=shown,
    )
    async def view_image(body: ImageViewRequest, request: Request) -> Response:
        """What the model sees of a picture: its tiles and patches, and the tokens that they become."""
        served.check_name(body.model, model)
        return Response(await image_view(body, context_of(request.scope), model), media_type="image/png")
