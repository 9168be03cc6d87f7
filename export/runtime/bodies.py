"""The image in a request's body, or in its form, read with limits. No torch."""

from collections.abc import Callable

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError  # starlette reads forms with it, of some versions unguarded
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Message, Receive

_FORM_EXTRA = 1 << 16  # bytes of a form around its image
_FORM = "multipart/form-data"


class _TooLarge(Exception):  # noqa: N818 (becomes an HTTPException)
    pass


def expected_bytes(request: Request, max_bytes: int) -> int:
    """Return how many bytes a request's body may have, by its head.

    Raises HTTPException: 413 if more than `max_bytes` are announced, 415 for another kind of body.
    """
    kind = _kind(request)
    if kind not in ("", _FORM, "application/octet-stream") and not kind.startswith("image/"):
        raise HTTPException(
            415, f"the body is {kind}: send an image with Content-Type image/..., or a form with a field image"
        )
    limit = max_bytes + (_FORM_EXTRA if kind == _FORM else 0)
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        return limit
    if int(length) > limit:
        raise _too_large(max_bytes)
    return int(length)


async def read_image_bytes(request: Request, max_bytes: int, move: Callable[[int], None] = lambda _: None) -> bytes:
    """Return the image of a request: its body, or its form's field `image`. `move` is told of bytes as they come.

    Raises HTTPException as `expected_bytes` does; 413 too as soon as more than `max_bytes` have come; 400 for a form
    that is damaged or lacks the field, or an empty image.
    """
    limit = expected_bytes(request, max_bytes)
    limited = Request(request.scope, _limited(request.receive, limit, move))
    try:
        data = await (_form_field(limited, limit) if _kind(request) == _FORM else _body(limited))
    except _TooLarge:
        raise _too_large(max_bytes) from None
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    if not data:
        raise HTTPException(400, "the image is empty: send one as the request's body or as the form's field image")
    return data


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the image has more than the {max_bytes} bytes allowed: send a smaller one")


def _limited(receive: Receive, limit: int, move: Callable[[int], None]) -> Receive:
    """Wrap `receive` to raise _TooLarge once more than `limit` bytes of the body have come."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _TooLarge
        move(len(message.get("body", b"")))
        return message

    return counted


async def _body(request: Request) -> bytes:
    return b"".join([chunk async for chunk in request.stream()])


async def _form_field(request: Request, limit: int) -> bytes:
    """Return the form's field `image`."""
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=8)
    parser.spool_max_size = limit  # in memory, which is reserved for it, not in a temporary file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    except FormParserError as error:
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    field = form.get("image")
    if not isinstance(field, UploadFile):
        raise HTTPException(400, "the form has no file in its field image: send one")
    if more := [name[:40] for name in form if name != "image"]:
        raise HTTPException(
            400, f"the form has a field {more[0]!r}: send image alone, and say the rest in the address (?{more[0]}=...)"
        )
    return await field.read()
