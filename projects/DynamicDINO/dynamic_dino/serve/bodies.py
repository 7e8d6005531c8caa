"""What a request says: a form or JSON -> an image, a prompt, options. Every other body is refused
with one line that says what is wrong."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple

import anyio
from fastapi import HTTPException, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ..modeling.prompt import Prompt
from ..serving.prompts import as_prompt
from ..serving.shipped import EXAMPLE_NAMES
from .batching import Options

MOST_NAMES = 2000  # LVIS has 1203
LONGEST_NAME = 500  # characters
LONGEST_TEXT = 50_000
BODY_SECONDS = 30  # in which a body must have come
HUNG_UP = 499  # the status as nginx calls it; nobody sees it but the metrics
FORM, JSON = "multipart/form-data", "application/json"
# of four black pixels, so that a page of documentation isn't flooded
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR4nGNgYGBgYAAAAAYAAXKCmeoAAAAASUVO"
    "RK5CYII="
)


class Wanted(BaseModel, extra="forbid"):
    """What to look for, and which detections are kept."""

    names: list[Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]] | None = Field(
        None,
        description="What to look for, one name each; in a form, a field for each name.",
        min_length=1,
        max_length=MOST_NAMES,
        examples=[list(EXAMPLE_NAMES)],
    )
    text: str | None = Field(
        None,
        description="Instead of `names`: the names, separated by full stops.",
        min_length=1,
        max_length=LONGEST_TEXT,
    )
    threshold: float | None = Field(None, description="Lowest score that is kept.", ge=0, le=1)
    nms: float | None = Field(
        None,
        description="Of boxes of one name that overlap more than this, the best is kept.",
        ge=0,
        le=1,
    )
    nms_agnostic: bool | None = Field(None, description="`nms` whatever the names are.")
    max_detections: int | None = Field(None, description="Most detections.", ge=1, le=100_000)


class Form(Wanted):
    """A form with a file."""

    image: Annotated[str, Field(description="The file.", json_schema_extra={"format": "binary"})]


class Document(Wanted):
    """A JSON document with the file in it."""

    image: str = Field(
        description="The file in base64, with or without `data:image/...;base64,` before it.",
        json_schema_extra={"contentEncoding": "base64"},
        examples=[EXAMPLE_IMAGE],
    )


class Asked(NamedTuple):
    """image: the bytes of a file. prompt: None for all classes of a closed-set detector."""

    image: bytes
    prompt: Prompt | None
    options: Options


def request_body() -> dict[str, Any]:
    """The body as OpenAPI describes it."""
    contents = {FORM: Form, JSON: Document}
    return {
        "required": True,
        "content": {kind: {"schema": m.model_json_schema()} for kind, m in contents.items()},
    }


async def read_body(request: Request, most: int) -> Asked:
    """Reads a request's body of at most `most` bytes.

    Raises HTTPException: 400 (no form, no JSON), 408 (it doesn't come), 413 (too large), 415
    (neither form nor JSON), 422 (a field is wrong).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (FORM, JSON):
        raise HTTPException(
            415,
            f"the body must be {FORM} (curl: -F image=@photo.jpg -F names={EXAMPLE_NAMES[0]}) or "
            f"{JSON}, not {kind[:100] or 'of no content type'}",
        )
    try:
        with anyio.fail_after(BODY_SECONDS):
            body = await _all_of(request, most)
    except TimeoutError:
        raise HTTPException(408, f"the body didn't come within {BODY_SECONDS} seconds") from None
    except ClientDisconnect:
        raise HTTPException(HUNG_UP, "the client has hung up") from None
    if kind == FORM:
        image, wanted = await _of_form(request, body)
    else:
        image, wanted = _of_json(body)
    options = Options(wanted.threshold, wanted.max_detections, wanted.nms, wanted.nms_agnostic)
    return Asked(image, _prompt(wanted), options)


def _prompt(wanted: Wanted) -> Prompt | None:
    if wanted.names is not None and wanted.text is not None:
        raise HTTPException(422, "give `names` or `text`, not both")
    for field, given in (("names", wanted.names), ("text", wanted.text)):
        if given is not None:
            try:
                return as_prompt(given)
            except ValueError as error:
                raise HTTPException(422, f"{field}: {error}") from None
    return None


async def _all_of(request: Request, most: int) -> bytes:
    stated = request.headers.get("content-length", "")
    body = bytearray()
    if not (stated.isdecimal() and int(stated[:19]) > most):
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise HTTPException(413, f"the body has more than {most / 1e6:g} MB: send a smaller file")


async def _of_form(request: Request, body: bytes) -> tuple[bytes, Wanted]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=1, max_fields=MOST_NAMES + 10, max_part_size=len(body)
    )
    parser.spool_max_size = len(body) + 1  # never to a disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form can't be read: {error.message}") from None
    except (ValueError, LookupError) as error:  # of a charset that isn't one
        raise HTTPException(400, f"the form can't be read: {error}") from None
    fields: dict[str, Any] = {}
    file = None
    for name, value in form.multi_items():
        if name == "image" and isinstance(value, UploadFile):
            file, fields[name] = await value.read(), ""
        elif isinstance(value, UploadFile):
            raise HTTPException(422, f"{_short(name)}: must be a value, not a file")
        elif name == "names":
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise HTTPException(422, f"{_short(name)}: was given twice")
        else:
            fields[name] = value
    if file is None and "image" in fields:
        raise HTTPException(422, "image: must be a file (curl: -F image=@photo.jpg)")
    wanted = _checked(lambda: Form.model_validate(fields))
    return file or b"", wanted


def _of_json(body: bytes) -> tuple[bytes, Wanted]:
    wanted = _checked(lambda: Document.model_validate_json(body, strict=True))
    encoded = re.sub(r"^data:[\w/.+-]*;base64,", "", wanted.image)
    try:
        return base64.b64decode(encoded, validate=True), wanted
    except (binascii.Error, ValueError) as error:
        raise HTTPException(422, f"image: is not base64 ({error})") from None


def _checked(validate: Any) -> Any:
    """What `validate` returns; of what it finds wrong, the first is said."""
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise HTTPException(400, f"the body can't be read: {first['msg']}")
    where = _short(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(Form.model_fields)
        raise HTTPException(422, f"{where}: there is no such field; there are {known}")
    raise HTTPException(422, f"{where or 'the body'}: {first['msg']}")


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:60]}..."
