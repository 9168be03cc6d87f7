"""What m3vit serve answers with: pictures, values, legends. No torch."""

import base64
import io
from typing import Any

import numpy as np
from fastapi import Response
from numpy.typing import NDArray
from PIL import Image
from starlette.types import Receive, Scope, Send

from m3vit.export.runtime.drawing import Swatches, colourise, legend
from m3vit.kinds import KINDS

PNG_LEVEL = 3  # of compression; beyond it, time grows faster than the file shrinks


def png(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def archive(predictions: dict[str, NDArray[Any]]) -> Response:
    """Return the values of several tasks as one .npz file, {task: array}."""
    file = io.BytesIO()
    np.savez(file, **predictions)  # type: ignore[arg-type]
    return Response(file.getvalue(), media_type="application/zip")


class Values(Response):
    """A prediction as .npy, sent from where it is."""

    media_type = "application/octet-stream"

    def __init__(self, array: NDArray[Any]) -> None:
        array, head = np.ascontiguousarray(array), io.BytesIO()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
        self.parts = (head.getvalue(), array.data.cast("B"))
        super().__init__(headers={"Content-Length": str(sum(map(len, self.parts)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for place, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": place + 1 < len(self.parts)})


def picture(prediction: NDArray[Any], task: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a prediction's picture as a data URL, and what its colours mean."""
    entry = manifest["tasks"][task]
    scale = KINDS[entry["decode"]].limits(prediction)
    url = "data:image/png;base64," + base64.b64encode(png(colourise(prediction, task, manifest, scale))).decode()
    meaning = legend(prediction, task, entry, scale, plain=True)
    if isinstance(meaning, Swatches):
        return {"picture": url, "legend": {"items": [{"name": name, "colour": c} for name, c in meaning.items]}}
    colours = meaning.colours[:: len(meaning.colours) // 15].tolist()
    return {
        "picture": url,
        "legend": {"title": meaning.title, "low": meaning.low, "high": meaning.high, "colours": colours},
    }
