"""What calls say behind the question mark, and lists in pages as OpenAI's clients walk through them."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Sequence
from typing import Any, TypeVar

from aiohttp import web
from multidict import MultiMapping

from trireme.bus.connection import AWAY
from trireme.errors import InvalidRequest, ServiceUnavailable

T = TypeVar("T")

MAX_PAGE = 100
PAGE = 20
PAGING = ("after", "limit", "order")


def query_of(request: web.Request, known: Collection[str]) -> MultiMapping[str]:
    """The query.

    Raises:
        InvalidRequest: it says something that is not known.
    """
    for name in request.query:
        if name not in known:
            raise InvalidRequest(f"unrecognized query parameter: {name[:80]}", param=name[:80])
    return request.query


def flag(query: MultiMapping[str], name: str) -> bool:
    """A boolean; absent: False.

    Raises:
        InvalidRequest: it is something else.
    """
    value = query.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return value == "true"


def whole_number(query: MultiMapping[str], name: str, *, least: int, most: int = 2**53) -> int | None:
    """A number; None where it is absent.

    Raises:
        InvalidRequest: it is none, or out of range.
    """
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and least <= int(text) <= most):
        raise InvalidRequest(f"{name} must be a whole number from {least} to {most}", param=name)
    return int(text)


def page_of(items: Sequence[dict[str, Any]], query: MultiMapping[str]) -> dict[str, Any]:
    """One page of items that come oldest first; newest first unless `order` is asc.

    Raises:
        InvalidRequest: the query asks for what there is not.
    """
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    limit = whole_number(query, "limit", least=1, most=MAX_PAGE) or PAGE
    ordered = list(items) if order == "asc" else list(reversed(items))
    after = query.get("after")
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"after: no {after[:80]!r} in this list", param="after")
        ordered = ordered[places[0] + 1 :]
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(ordered) > limit,
    }


async def kept(work: Awaitable[T]) -> T:
    """What a store says.

    Raises:
        ServiceUnavailable: Redis is away.
    """
    try:
        return await work
    except AWAY as error:
        raise ServiceUnavailable("the store does not answer: try again", retry_after_s=1.0) from error
